# make demo   sets everything up, then trains, evaluates and draws a SAN Mask R-CNN
# make test   sets everything up, then runs the tests
# make docs   builds the documentation into docs/_build
# make lint   ruff, mypy, licences, the workflows
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
JOBS ?= 2
# threads that wait for one another sleep rather than spin, which costs little alone and much beside other work
export OMP_WAIT_POLICY ?= PASSIVE
READY := .venv/.ready

.PHONY: demo test coverage docs docs-check app-check lint types api test-timm test-mim test-mmpretrain test-package test-wheel wheels release release-check test-sanitize test-mutants \
  test-long test-kills test-versions test-hosts test-exports lock locked clean

# make demo DATA=/folder/of/data trains on your own pictures, with labels of COCO, VOC or YOLO
demo: $(READY)
	$(BIN)/python demo/train.py $(if $(DATA),--data "$(DATA)")

# JOBS tests at a time, one thread each: most of them are too small to use more
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term --cov-report=html:.cache/coverage

docs: $(READY)
	$(BIN)/python -m sphinx -W -n --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

# every page in a headless Chromium, without a network, at 390 and 1280 pixels. Needs chromium and its driver
docs-check: docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'selenium>=4.20'
	$(BIN)/python -m tools.check_docs

# the page of san-backbones app, and the file of attention --html, in such a browser: drop, click, switch, download
app-check: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'selenium>=4.20' -e '.[app]'
	$(BIN)/python -m tools.check_app

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/reuse lint --quiet
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/actionlint .github/workflows/*.yml

# how much of the public interface has a known type
types: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pyright[nodejs]>=1.1.400'
	$(BIN)/python -m tools.check_types

# what has changed in the public interface since the last release, in a way that breaks programs
api: $(READY)
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null) || { echo 'no release to compare with yet'; exit 0; }; \
	  $(BIN)/griffe check san_backbones --against "$$tag"

# timm's own model tests, for our models
test-timm: $(READY)
	$(BIN)/python -m tools.run_timm_tests

# OpenMMLab's mim and MMPretrain do not go together with all the rest: their tests run in environments of their own
test-mim test-mmpretrain: test-%: $(READY)
	$(BIN)/python -m tools.run_apart $*

# an sdist, the wheel made of it, and both in environments with nothing else
test-package: $(READY)
	$(BIN)/python -m tools.run_package

# make test-wheel TAG=win_amd64 tries the wheel of that tag in dist/, on such a machine, in a clean environment
test-wheel:
	$(PYTHON) -m tools.run_package dist/*$(TAG)*.whl

# the sdist and the wheels of all platforms, cross-compiled, into dist/
wheels: $(READY)
	$(BIN)/python -m tools.wheels --install

# make release VERSION=0.2.0, behind `python -m tools.release prepare 0.2.0`: wheels, SBOM, checksums, and an upload to a
# package index on this machine, from which it is installed
release: $(READY)
	$(BIN)/python -m tools.release build $(VERSION)
	$(BIN)/python -m tools.release check $(VERSION)
	$(BIN)/python -m tools.release try $(VERSION)

release-check:
	$(PYTHON) -m tools.release check $(VERSION)

# the compiled loops under AddressSanitizer and UndefinedBehaviorSanitizer; needs a GCC with libasan and libubsan
test-sanitize: $(READY)
	$(BIN)/python -m tools.run_sanitized

# small faults, planted one at a time: which test notices each? Writes tools/mutants.md
test-mutants: $(READY)
	$(BIN)/python -m tools.run_mutants

# thousands of training steps and calls: memory stays flat
test-long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.run_long

# kill -9 at random moments of trainings, downloads, the authors' files, conversions, publications and extractions
test-kills: $(READY)
	$(BIN)/python -m tools.run_kills all

# the oldest and newest Python, torch, timm and huggingface_hub, each in an environment of its own; hours and some GB.
# ONLY=NAME: one of them.
# Writes docs/reference/versions.md
test-versions: $(READY)
	$(BIN)/python -m tools.run_versions $(if $(ONLY),--only "$(ONLY)")

# SAN in other libraries, each in an environment of its own; an hour, and some GB. ONLY=NAME: one of them.
# Writes the table of docs/how-to/other-libraries.md
test-hosts: $(READY)
	$(BIN)/python -m tools.run_hosts $(if $(ONLY),--only $(ONLY))

# every runtime of `san-backbones export`, each in an environment of its own; an hour, and some GB. ONLY=NAME: one of them.
# Writes the table of docs/how-to/export.md
test-exports: $(READY)
	$(BIN)/python -m tools.run_exports $(if $(ONLY),--only $(ONLY))

# versions and digests of everything that make test installs; needs uv. Versions that still fit stay as they are
lock:
	uv pip compile setup.cfg --extra mm --extra demo --extra test --extra lint --python-version 3.11.5 \
	  --python-platform x86_64-unknown-linux-gnu --generate-hashes --no-annotate --no-emit-package san-backbones \
	  --custom-compile-command 'make lock (for Python 3.11 on Linux, x86-64; `make locked` installs it)' \
	  -q -o requirements/dev.lock

# .venv with exactly those versions, for Python 3.11 on Linux. The lock names all; where a dependency is written with an
# extra, as in coverage[toml], pip 23 asks for a digest of that too unless it is told to take no more
locked:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@touch $(READY)

$(READY): setup.cfg pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	  "Python 3.10 to 3.13 is needed, and %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[mm,demo,test,lint]'
# opencv-python needs the system's libGL and X11; where they are missing, the headless build has the same functions
	@$(BIN)/python -c 'import cv2' || { echo 'opencv-python cannot load here; installing opencv-python-headless'; \
	  $(BIN)/python -m pip uninstall -y opencv-python; $(BIN)/python -m pip install opencv-python-headless; }
	@touch $(READY)

clean:
	rm -rf .venv .cache work_dirs build dist upload docs/_build docs/_figures *.egg-info .mypy_cache .ruff_cache .coverage*
