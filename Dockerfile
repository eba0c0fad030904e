# A base with Python 3.11 or newer and pip, on Debian or Ubuntu.
ARG BASE=python:3.11-slim
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/foleyscale

# DeepSpeed must see torch while it builds, and must not compile its operators. This layer changes only with the tested versions.
COPY constraints.txt ./
RUN pip install -c constraints.txt torch numpy setuptools wheel packaging \
 && DS_BUILD_OPS=0 pip install -c constraints.txt --no-build-isolation deepspeed

COPY . .
RUN pip install -c constraints.txt --no-build-isolation '.[s3]'

# `docker run --user` may name a user that the image does not know: torch asks for its name, and caches need a home it may write to.
RUN useradd --create-home foleyscale && mkdir /work && chown foleyscale /work
ENV HOME=/tmp USER=foleyscale
USER foleyscale
WORKDIR /work
ENTRYPOINT ["foleyscale"]
