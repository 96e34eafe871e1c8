# make demo        prepares text, trains a small model on the CPU, prints what it writes
# make test        runs the whole test suite
# make gpu-check   kernel tests and the speed of every preset on an Nvidia GPU, beside what is kept for that card
# make clean       removes .venv and caches, never data/ or out/
#
# Needs Python 3.10 or newer (choose one with PYTHON=python3.12); everything else goes into .venv.

PYTHON ?= python3
PY := .venv/bin/python

help:
	@sed -n 's/^# make/make/p' Makefile

demo: .venv/ready
	$(PY) prepare.py --dataset=stdlib
	$(PY) train.py config/tiny.py
	$(PY) sample.py --out_dir=out/tiny --prompt='def '
	@echo "chat with it: $(PY) sample.py --out_dir=out/tiny --interactive"

test: .venv/ready .venv/trackers .venv/notebook
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 3 --dist worksteal

gpu-check: .venv/ready
	$(PY) -m experiments.gpu_check

clean:
	rm -rf .venv .pytest_cache .hypothesis __pycache__ */__pycache__

# The stamp .venv/ready is written last, so an interrupted installation is repeated. It is renewed when requirements.txt
# is newer, and when the Python in .venv no longer runs (moved, removed): then .venv is rebuilt.
WORKS := $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
.venv/ready: requirements.txt $(shell $(WORKS) || echo FORCE)
	@$(WORKS) || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
			{ echo "$(PYTHON) is missing or older than 3.10: install a newer one, or choose it with PYTHON=..." >&2; exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
			{ echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
		$(PYTHON) -m venv --clear .venv; }
	@echo "installing torch and the rest of requirements.txt into .venv (once, a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Optional at run time, so not in requirements.txt. Where they are not available, their tests are skipped.
trackers := tensorboard==2.21.0 wandb==0.31.0
notebook := nbclient==0.11.0 ipykernel==7.3.0
.venv/trackers .venv/notebook: .venv/ready
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt $($(@F)) && touch $@ || \
		echo "not installed: $($(@F)); their tests are skipped" >&2

FORCE:
.PHONY: help demo test gpu-check clean FORCE
