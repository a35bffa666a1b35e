# Untested: no container has been built from this file yet.
#
#   docker build -t rs-gguf .
#   mkdir -p out  # Docker would make it for root alone
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/out:/out" -v rs-gguf-cache:/cache rs-gguf run --out /out/demo
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
COPY . /source
ENV CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"
RUN python -m venv /opt/rs-gguf && /opt/rs-gguf/bin/pip install --no-cache-dir "/source[run]"

FROM python:3.12-slim
# The OpenMP library that llama.cpp was linked with.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/rs-gguf /opt/rs-gguf
RUN useradd --create-home user && mkdir -m 1777 /cache /out
USER user
ENV PATH="/opt/rs-gguf/bin:$PATH" XDG_CACHE_HOME=/cache
VOLUME ["/cache", "/out"]
ENTRYPOINT ["rs-export"]
