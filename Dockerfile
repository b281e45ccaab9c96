# syntax=docker/dockerfile:1
# CPU:  docker build -t rhumbline .
# GPU:  docker build -t rhumbline:gpu --build-arg EXTRA=gpu .
#       docker run --gpus all -e RHUMB_DEVICE=cuda … (without the variable it serves on the CPU)

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRA=cpu
WORKDIR /src
RUN python -m venv /opt/rhumbline
ENV PATH=/opt/rhumbline/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# what it depends on, which a change of the code leaves as it is; then the code
COPY pyproject.toml README.md LICENSE NOTICE ./
RUN pip install ".[${EXTRA}]"
COPY service service
COPY models models
COPY loadtest loadtest
RUN pip install --no-deps --force-reinstall .

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="rhumbline" \
      org.opencontainers.image.description="Generative retrieval server" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 rhumbline \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/rhumbline --create-home rhumbline \
    && mkdir /bundle && chown rhumbline:rhumbline /bundle
COPY --from=build /opt/rhumbline /opt/rhumbline
# A read-only root works: kernels and the demo's bundle go to the cache folder; where that is not writable, kernels go to
# /tmp, and the demo says so and stops.
ENV PATH=/opt/rhumbline/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RHUMB_HOST=0.0.0.0 RHUMB_BUNDLE=/bundle RHUMB_CACHE_DIR=/var/lib/rhumbline/cache RHUMB_LOG_FORMAT=json
USER 10001:10001
VOLUME /var/lib/rhumbline
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import os, sys, http.client as h; c = h.HTTPConnection('127.0.0.1', int(os.environ.get('RHUMB_PORT', '8080')), timeout=5); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["rhumb"]
CMD ["serve"]
