# syntax=docker/dockerfile:1
# Small, non-root, no secrets: the configuration and the DSN come in as files or environment at run time.

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/keyproxy
COPY requirements/base.txt requirements/base.txt
RUN /opt/keyproxy/bin/pip install --only-binary=:all: -r requirements/base.txt
# The compiled build: what it needs stays in this stage. `--build-arg COMPILE=0` gives the pure one, which behaves alike.
ARG COMPILE=1
COPY requirements/compile.txt requirements/compile.txt
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && python -m venv /opt/build && /opt/build/bin/pip install --only-binary=:all: -r requirements/compile.txt
COPY setup.py pyproject.toml README.md ./
COPY keyproxy keyproxy
RUN KEYPROXY_COMPILE=$COMPILE /opt/build/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /dist . \
    && /opt/keyproxy/bin/pip install --no-deps /dist/*.whl

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="keyproxy" \
      org.opencontainers.image.description="Tells a compute server, for every request, on whose behalf it comes"
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin keyproxy
COPY --from=build /opt/keyproxy /opt/keyproxy
ENV PATH=/opt/keyproxy/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    KEYPROXY_LISTEN__ADDRESS=0.0.0.0:8080 \
    KEYPROXY_OPS__ADDRESS=127.0.0.1:9090
USER 10001:10001
EXPOSE 8080
# Drains on SIGTERM; give it longer than listen.drain_seconds (`docker stop --time 35`).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/livez', timeout=2)"]
ENTRYPOINT ["keyproxy"]
CMD ["serve"]
