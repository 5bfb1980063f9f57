# syntax=docker/dockerfile:1
# Small, non-root, no secrets: the configuration and the DSN are passed as files or environment variables at run time.

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/keyproxy
COPY requirements/container.txt requirements/container.txt
RUN /opt/keyproxy/bin/pip install --only-binary=:all: --require-hashes -r requirements/container.txt
# The compiled build; its tools stay in this stage. `--build-arg COMPILE=0` builds the pure Python one, which behaves alike.
ARG COMPILE=1
COPY requirements/container-build.txt requirements/container-build.txt
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --only-binary=:all: --require-hashes -r requirements/container-build.txt
COPY setup.py pyproject.toml README.md LICENSE config.example.toml ./
COPY keyproxy keyproxy
RUN KEYPROXY_COMPILE=$COMPILE /opt/build/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /dist . \
    && /opt/keyproxy/bin/pip install --no-deps /dist/*.whl
COPY container.toml /opt/keyproxy/container.toml

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="keyproxy" \
      org.opencontainers.image.description="A reverse proxy that authenticates API keys, enforces limits and forwards the caller's identity upstream" \
      org.opencontainers.image.licenses="Apache-2.0"
# tini reaps processes that outlive their parents, and forwards signals.
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 keyproxy \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keyproxy
COPY --from=build /opt/keyproxy /opt/keyproxy
# No variable here sets a key of the configuration, because it would override a mounted file. The defaults of the image are
# in container.toml, which the file and the environment override.
ENV PATH=/opt/keyproxy/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    KEYPROXY_DEFAULTS=/opt/keyproxy/container.toml
USER 10001:10001
EXPOSE 8080 9090
# SIGTERM drains the proxy. Its stop timeout must exceed the sum of listen.linger_seconds and
# listen.drain_seconds (`docker stop --time 40`).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["keyproxy", "health"]
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "keyproxy"]
CMD ["serve"]
