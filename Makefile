# make demo   the main job on the text that comes with the package: train, score, quantise, score again
# make test   the test suite
# Both make their own environment first: Python 3.11 or newer, a C compiler and make are all that is needed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: demo test lint clean

demo: $(STAMP)
	$(VENV)/bin/pgolf run configs/demo.toml --out runs/demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --durations 25 -m "not slow"

lint: $(STAMP)
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) runs .jax_cache build *.egg-info

$(STAMP): pyproject.toml $(wildcard kernels/ngram/*.c kernels/ngram/*.h)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@
