# make demo   sets everything up, then trains, evaluates and draws a small SAN Mask R-CNN
# make test   sets everything up, then runs the tests
PYTHON ?= python3
BIN := .venv/bin
# threads that wait for one another sleep rather than spin, which costs little alone and much beside other work
export OMP_WAIT_POLICY ?= PASSIVE
READY := .venv/.ready

.PHONY: demo test test-timm test-mim test-mmpretrain clean

# make demo DATA=/folder/of/coco-format/data trains on your own pictures
demo: $(READY)
	$(BIN)/python demo/train.py $(if $(DATA),--data "$(DATA)")

test: $(READY)
	$(BIN)/python -m pytest

# timm's own model tests, for our models
test-timm: $(READY)
	$(BIN)/python tests/run_timm_tests.py

# OpenMMLab's mim and MMPretrain do not go together with all the rest: their tests run in environments of their own
test-mim test-mmpretrain: test-%: $(READY)
	$(BIN)/python tests/run_apart.py $*

$(READY): setup.cfg pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	  "Python 3.10 to 3.13 is needed, and %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[mm,demo,test]'
# opencv-python needs the system's libGL and X11; where they are missing, the headless build has the same functions
	@$(BIN)/python -c 'import cv2' || { echo 'opencv-python cannot load here; installing opencv-python-headless'; \
	  $(BIN)/python -m pip uninstall -y opencv-python; $(BIN)/python -m pip install opencv-python-headless; }
	@touch $(READY)

clean:
	rm -rf .venv .cache work_dirs build dist *.egg-info
