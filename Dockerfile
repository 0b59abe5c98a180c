# Two images of easel. `docker compose` builds both; by hand: docker build --target cuda --tag easel:cuda .
#   cuda  for NVIDIA GPUs, on x86-64 and on arm64 (DGX Spark). torch brings CUDA, the host the driver.
#   cpu   to try it with the bundled demo model.
# BASE_IMAGE is any Debian or Ubuntu whose Python is 3.11 or later. Where pip needs a configuration of its own:
#   docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf ...
# At run time the root file system may be read-only and the user is nobody in particular: what is written goes to
# /cache (models and compiled kernels: a volume) and /tmp.

ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin easel \
    && install --directory --owner easel --group easel /cache /cache/models /cache/kernels
ENV PATH=/opt/easel/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRITON_CACHE_DIR=/cache/kernels \
    CUDA_CACHE_PATH=/cache/kernels/cuda \
    EASEL_HOST=0.0.0.0 \
    EASEL_PORT=8000
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 CMD ["python", "-c", "import http.client, os; \
    asked = http.client.HTTPConnection('127.0.0.1', os.environ['EASEL_PORT'], timeout=4); \
    asked.request('GET', '/ready'); raise SystemExit(asked.getresponse().status != 200)"]
ENTRYPOINT ["easel"]
CMD ["serve"]

FROM python AS installed
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && python3 -m venv /opt/easel
WORKDIR /source
# An index beside pip's own, as that of torch's CPU builds.
ARG PIP_EXTRA_INDEX_URL
# First what easel stands on, beside an easel without any file: a change of ours does not install torch again.
COPY pyproject.toml constraints.txt README.md ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-input --progress-bar off --constraint constraints.txt .
COPY engine engine
COPY server server
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-input --progress-bar off --no-deps --force-reinstall .

FROM installed AS installed-cpu
# Triton compiles for GPUs only, and is as large as torch's CPU build.
RUN pip uninstall --yes triton \
    && python -c "import torch; torch.version.cuda and print('NOTE: this torch was built for CUDA, which makes the' \
       'image some gigabytes larger; PIP_EXTRA_INDEX_URL can name an index that has its CPU build')"

FROM installed AS installed-cuda
RUN python -c "import sys, torch; sys.exit(torch.version.cuda is None and f'torch {torch.__version__} was built' \
    'without CUDA; see to it that pip finds a build that has it')"

FROM python AS cpu
COPY --from=installed-cpu /opt/easel /opt/easel
USER easel

FROM python AS cuda
# Triton builds its launchers with a C compiler, the first time a kernel runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=installed-cuda /opt/easel /opt/easel
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER easel
