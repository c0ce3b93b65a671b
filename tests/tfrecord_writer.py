"""Write the TFRecord files of Multi-Object Datasets, in every variant of encoding that protocol buffers allow. Used by tests and by nbs/api/28_tfrecord."""
import gzip, random, struct
import google_crc32c
import numpy as np

def masked_crc(data):
    "TensorFlow's masked CRC-32C: rotated by 15 bits, plus a constant."
    c = google_crc32c.value(bytes(data))
    return ((c >> 15 | c << 17) + 0xa282ead8) & 0xffffffff

def frame(payload):
    "One record: length, checksum of the length, payload, checksum of the payload."
    head = struct.pack('<Q', len(payload))
    return head + struct.pack('<I', masked_crc(head)) + payload + struct.pack('<I', masked_crc(payload))

def varint(n):
    out = bytearray()
    n &= 2**64 - 1
    while n > 127: out.append(n & 127 | 128); n >>= 7
    return bytes(out) + bytes([n])

def message(number, content):
    "A field of a protocol buffer that holds bytes."
    return varint(number << 3 | 2) + varint(len(content)) + content

def encode(array, packed=True, raw=False):
    "One tf.train.Feature: bytes for uint8 (one string per element, or one in all), floats, or integers."
    a = np.ascontiguousarray(array)
    if a.dtype == np.uint8:
        one_each = np.stack([np.full(a.size, 10, np.uint8), np.full(a.size, 1, np.uint8), a.ravel()], 1)
        return message(1, message(1, a.tobytes()) if raw else one_each.tobytes())
    if a.dtype.kind == 'f':
        a = a.astype('<f4').ravel()
        return message(2, message(1, a.tobytes()) if packed else b''.join(b'\x0d' + x.tobytes() for x in a))
    ints = [varint(int(x)) for x in a.ravel()]
    return message(3, message(1, b''.join(ints)) if packed else b''.join(b'\x08' + x for x in ints))

def example(features, **kw):
    "One tf.train.Example; the order of the features is that of the dict."
    entries = (message(1, message(1, k.encode()) + message(2, encode(v, **kw))) for k, v in features.items())
    return message(1, b''.join(entries))

def features_of(scenes, i, layout='k h w'):
    "The arrays of scene `i` as the published files lay them out."
    onehot = scenes[i].one_hot(scenes.num_entities)[0].numpy().astype(np.uint8)*255
    mask = onehot[..., None] if layout == 'k h w' else onehot.transpose(1, 2, 0)[..., None]
    return dict(image=scenes.image[i].transpose(1, 2, 0), mask=mask) | {k: v[i] for k, v in scenes.factors.items()}

def write_tfrecord(path, scenes, layout='k h w', compress=True, shuffle=0, **kw):
    "Write `scenes`; features in another order in every record, as in the published files."
    rng = random.Random(shuffle)
    with open(path, 'wb') as f, (gzip.GzipFile(fileobj=f, mode='wb', mtime=0, compresslevel=6) if compress else f) as out:
        for i in range(len(scenes)):
            features = list(features_of(scenes, i, layout).items()); rng.shuffle(features)
            out.write(frame(example(dict(features), **kw)))
    return path
