# Two commands do all the set-up: `make demo` and `make test`. Each makes its own virtual environment in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EXAMPLE := examples/t5gemma-g2p
WORDS ?= "k n i g h t" "c o m p i l e r" "e d g e w r i g h t"

.PHONY: demo test test-slow lint clean

$(VENV)/.product: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[plot]'
	touch $@

$(VENV)/.dev: $(VENV)/.product
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.product
	rm -rf demo
	mkdir demo
	$(BIN)/edgewright export -m $(EXAMPLE) --format onnx --bits 4.5 --importance lim --task $(EXAMPLE)/heldout.tsv -o demo/bundle
	$(BIN)/edgewright verify demo/bundle -m $(EXAMPLE) --task $(EXAMPLE)/heldout.tsv
	$(BIN)/edgewright profile demo/bundle -p 16,64 -n 32 -d 16 -r 5
	@for word in $(WORDS); do echo "$$word -> $$($(BIN)/edgewright run demo/bundle --prompt "$$word")"; done

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

# mypy must see the package under its own name, whatever the checkout's folder is called.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .build && ln -sfn ../ .build/edgewright
	MYPYPATH=.build $(BIN)/mypy --strict -p edgewright

clean:
	rm -rf $(VENV) .build build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
