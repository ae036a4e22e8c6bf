# Two commands do all the set-up on a fresh machine:
#   make quickstart   install, then text -> tokens -> teacher targets -> students -> table and sample
#   make test         install, then lint, types, import contract and tests

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

NATIVE := $(shell find src/native -name '*.[chi]*') CMakeLists.txt

.PHONY: quickstart kernels test test-all verify lint mutants bench wheel sanitize check-arm clean

quickstart: $(VENV)/.core kernels
	$(BIN)/limbeck run recipes/quickstart.yaml

# The C++ extension, into src/. Without a compiler this says so, and NumPy does what it can.
kernels: $(VENV)/.kernels

test: lint kernels
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint kernels
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

verify: $(VENV)/.verify
	$(BIN)/python -m pytest tests/e2e/test_llama_cpp.py tests/e2e/test_openai_echo.py -m slow

# The extension under the compiler's sanitizers: products, the engine's tests and 2,000 mutated files; then threads.
sanitize: $(VENV)/.dev $(VENV)/.kernels
	$(BIN)/python tools/sanitize.py

# NEON's products under an emulator: needs Debian's qemu-user and g++-aarch64-linux-gnu.
check-arm:
	mkdir -p build/arm
	for file in cpu pool linear blocks tiles kernels kernels_scalar; do \
		aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Werror -DLIMBECK_NEON -Isrc/native \
			-c src/native/$$file.cpp -o build/arm/$$file.o || exit 1; \
	done
	aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Werror -DLIMBECK_NEON -Isrc/native -march=armv8.2-a+dotprod \
		-c src/native/kernels_neon.cpp -o build/arm/kernels_neon.o
	aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Werror -DLIMBECK_NEON -Isrc/native -static -pthread \
		tests/native_products.cpp build/arm/*.o -o build/arm/products
	qemu-aarch64 -cpu max build/arm/products
	LIMBECK_KERNELS=scalar qemu-aarch64 -cpu max build/arm/products
	qemu-aarch64 -cpu cortex-a72 build/arm/products  # which has no dot products

# A wheel that needs no compiler where it is installed, tried in an environment of its own; and the source archive.
wheel: $(VENV)/.venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tools/try_wheel.py dist

# Small errors in the source, and the share of them that the tests notice; `tests/mutants.py --quick` is the short one.
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py --survivors

bench: $(VENV)/.bench $(VENV)/.verify $(VENV)/.kernels
	mkdir -p benchmarks/results
	for name in loss cache pack train ternary tail remote students compress kernels engine; do \
		$(BIN)/python benchmarks/$$name.py --json > benchmarks/results/$$name.json; \
		status=$$?; \
		cat benchmarks/results/$$name.json; \
		case $$status in \
			0) ;; \
			3) echo "benchmarks/$$name.py: exit status 3, a headline ratio is too noisy to judge" >&2 ;; \
			*) exit $$status ;; \
		esac; \
	done

# One virtual environment; each stamp adds an extra to it and is renewed when the dependencies change.
$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit("limbeck needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.core: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[serve]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.core

$(VENV)/.kernels: $(VENV)/.venv $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cmake nanobind ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/build_kernels.py
	ls src/limbeck/kernels/_native*.so > /dev/null 2>&1 && touch $@ || true

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

$(VENV)/.verify: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[verify]"
	touch $@

clean:
	rm -rf $(VENV) outputs benchmarks/results
