# Everything is installed into .venv, once. `make help` lists what there is.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10
OUT ?= runs/demo
STEPS ?=
TORCH_INDEX ?= $(shell cat .venv/torch-index 2>/dev/null)
BIN := .venv/bin
export TORCH_INDEX

# The environment is ready when this file exists: its name sums up all that decides what is installed.
READY := .venv/ready-$(shell (cat settings.ini setup.py tools/constraints.txt; echo '$(TORCH_INDEX)') | cksum | cut -d' ' -f1)
TORCH = $(shell sed -n 's/^requirements.*[ =]\(torch[<>=][^ ]*\).*/\1/p' settings.ini)
MODERN := -c 'import sys; sys.exit(sys.version_info < (3, 10))'

.PHONY: help env demo test test-slow notebooks readme docs

help: ## this list
	@echo "make TARGET [NAME=value ...]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'
	@echo "  PYTHON=...       interpreter to build .venv from (3.10 or newer)"
	@echo "  TORCH_INDEX=...  package index to take torch from, e.g. the one with wheels for your GPU"

demo: $(READY) ## train the built-in default, evaluate it; results in runs/demo (STEPS=20: a quick look; OUT=...: elsewhere)
	@echo "== train tetrominoes_cpu$(if $(STEPS), for $(STEPS) steps) into $(OUT)"
	@$(BIN)/emorl_train tetrominoes_cpu --out '$(OUT)' --overwrite $(if $(STEPS),--num-steps $(STEPS))
	@echo "== evaluate it on unseen scenes and on the ten real ones"
	@$(BIN)/emorl_evaluate '$(OUT)' --data tetrominoes tetrominoes_real --out '$(OUT)'
	@test -n "$$(find '$(OUT)/results' -name slots.png -size +0)" || { echo "$(OUT)/results holds no slots.png" >&2; exit 1; }

test: $(READY) ## everything CI checks; closes with 'N passed, N failed'
	@$(BIN)/python tools/check.py

test-slow: $(READY) ## the long cells and tests too
	@$(BIN)/python tools/check.py --slow

notebooks: $(READY) ## export, run all pages in place (or NB="nbs/api/00_core.ipynb ..."), clean, render README.md
	@echo "== export"; $(BIN)/nbdev_export
	@echo "== run in place"; $(BIN)/python tools/notebooks.py --update $(NB)
	@echo "== clean"; $(BIN)/nbdev_clean
	@$(BIN)/python tools/readme.py

readme: $(READY) ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: $(READY) ## the book, from the notebooks as they stand, into _docs; every link is followed, every page opened in Chromium
	@echo "== build into _docs"; rm -rf _docs; $(BIN)/python -m sphinx -q -W --keep-going -E -d _proc/doctrees -c docs nbs _docs
	@echo "== look at every page"; $(BIN)/python tools/check_docs.py

env: $(READY) ## only the environment

$(READY):
	@$(BIN)/python $(MODERN) 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for p in $(PYTHON); do $$p $(MODERN) 2>/dev/null && { echo "== new environment .venv from $$($$p --version)"; exec $$p -m venv --clear .venv; }; done; \
	  echo "emorl needs Python 3.10 or newer, and none was found as $(PYTHON) ($(firstword $(PYTHON)) is $$($(firstword $(PYTHON)) --version 2>&1 || true))." >&2; \
	  echo "Install one, or name it: make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "== install emorl and what it needs into .venv (some minutes, 2 GB; the next call reuses it)"
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(if $(TORCH_INDEX),$(BIN)/python -m pip install -qq --index-url '$(TORCH_INDEX)' '$(TORCH)' && echo '$(TORCH_INDEX)' >.venv/torch-index)
	@$(BIN)/python -m pip install -qq $(if $(TORCH_INDEX),,-c tools/constraints.txt) -e '.[dev,docs]'
	@rm -f .venv/ready-*; touch $@
