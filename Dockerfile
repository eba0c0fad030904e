# The last image's base: Debian or Ubuntu whose python3 is 3.11 or newer. A -base- image of nvidia/cuda holds the CUDA runtime; the wheels of
# torch bring the other libraries, which -runtime- would hold a second time.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
# The same distribution, with what the build needs beside: for flash-attn the CUDA compiler, nvidia/cuda:13.0.2-devel-ubuntu24.04.
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS dependencies
# With a date set, byte code is checked by the hash of its source and not by its time: two builds hold the same bytes.
ARG SOURCE_DATE_EPOCH=946684800
# The distribution of the base decides the versions of its packages: name the base by its digest to pin them.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/foleyscale
ENV PATH=/opt/foleyscale/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# PyPI's torch has CUDA inside; another index has other builds, such as https://download.pytorch.org/whl/cpu.
ARG TORCH_INDEX=
COPY constraints.txt ./
# DeepSpeed must see torch while it builds, and must not compile its operators: none of them is used. Its metadata come out of a set.
# Settings of pip, such as a mirror and its password, come as a secret: they are in no layer.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch numpy setuptools wheel packaging \
 && DS_BUILD_OPS=0 PYTHONHASHSEED=0 pip install -c constraints.txt --no-build-isolation deepspeed

# A version of flash-attn, compiled from source; empty leaves it out. Torch's own attention has flash kernels without it.
ARG FLASH_ATTN=
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    if [ -n "${FLASH_ATTN}" ]; then pip install -c constraints.txt --no-build-isolation "flash-attn==${FLASH_ATTN}"; fi

# The metadata without the code: this layer changes only with the dependencies.
ARG EXTRAS=s3
COPY setup.cfg pyproject.toml ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c constraints.txt --no-build-isolation ".[${EXTRAS}]" && rm -rf build ./*.egg-info

FROM dependencies AS wheel
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

FROM ${BASE}
# More packages of the distribution, such as ffmpeg for torchcodec.
ARG APT=
# NCCL looks for libibverbs, and without it takes TCP where InfiniBand is there.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates ibverbs-providers libibverbs1 python3 ${APT} \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home foleyscale \
 && install --directory --owner=foleyscale /work
COPY --from=dependencies /opt/foleyscale /opt/foleyscale
ARG SOURCE_DATE_EPOCH=946684800
ENV PATH=/opt/foleyscale/bin:${PATH}
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index --force-reinstall /dist/*.whl

# `docker run --user` may name a user that the image does not know: torch asks for its name, and caches need a home it may write to.
ENV HOME=/tmp USER=foleyscale LANG=C.UTF-8
# A number, so that Kubernetes can tell that it is not root.
USER 10001
WORKDIR /work
# No HEALTHCHECK: looking at a GPU takes memory from the training on it. `foleyscale doctor` looks before.
ENTRYPOINT ["foleyscale"]
