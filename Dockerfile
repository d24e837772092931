# trimix with its nano trio, as a server that is not root.
#
#   docker build -t trimix .
#   docker run --rm -p 127.0.0.1:8080:8080 -v trios:/trios trimix
#
# benchmarks/container.py runs these steps in a fresh Debian where no container engine is.

FROM python:3.13-slim-trixie AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/trimix
WORKDIR /source
# llama.cpp first: it takes minutes, and only these files can change it.
COPY pyproject.toml ./
COPY trimix_gguf/__init__.py trimix_gguf/errors.py trimix_gguf/
COPY trimix_gguf/machine/__init__.py trimix_gguf/machine/build.py \
    trimix_gguf/machine/processor.py trimix_gguf/machine/library_only.cmake \
    trimix_gguf/machine/probe.cpp trimix_gguf/machine/tile_config.h trimix_gguf/machine/
RUN /build/bin/python trimix_gguf/machine/build.py wheel /wheels --portable
COPY README.md LICENSE ./
COPY convert convert
COPY trimix_gguf trimix_gguf
RUN /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN /build/bin/pip --python /opt/trimix/bin/python install --no-cache-dir \
    --only-binary :all: /wheels/*.whl

FROM python:3.13-slim-trixie
RUN groupadd --gid 10001 trimix \
    && useradd --uid 10001 --gid 10001 --home-dir /trios --no-create-home trimix \
    && install --directory --owner 10001 --group 10001 /trios
COPY --from=build /opt/trimix /opt/trimix
# Trios, and what was measured of them, stay in the volume; the rest may be read-only.
ENV PATH=/opt/trimix/bin:$PATH \
    HOME=/trios \
    TRIMIX_HOME=/trios \
    TRIMIX_CACHE=/trios/.cache/trimix
USER 10001:10001
WORKDIR /trios
VOLUME ["/trios"]
EXPOSE 8080
# A large trio takes its time to load. No proxy: it could not reach this address.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "from urllib import request as r; \
r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["trimix"]
# Nobody gets in without a key, however the port is published: TRIMIX_API_KEY, or one made and
# printed. Running answers have 8 of the 10 seconds that `docker stop` waits.
CMD ["serve", "--trio", "nano", "--host", "0.0.0.0", "--new-key", "--drain", "8"]
