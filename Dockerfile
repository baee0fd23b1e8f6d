# An image with the rlhf-jax command for TPU VMs and GPU hosts.
#   docker build --build-arg EXTRAS=tpu,gcs -t rlhf-jax .
#   docker build --build-arg EXTRAS=gpu -t rlhf-jax .
FROM python:3.11-slim-bookworm
ARG EXTRAS=tpu,gcs
RUN apt-get update \
    && apt-get install -y --no-install-recommends git=1:2.39.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY rlhf_jax rlhf_jax
COPY experiments experiments
COPY configs configs
RUN pip install --no-cache-dir ".[${EXTRAS}]" -c constraints.txt && rm -rf /src/*
RUN useradd --create-home --home-dir /rlhf --uid 1000 rlhf
USER 1000
WORKDIR /rlhf
ENTRYPOINT ["rlhf-jax"]
CMD ["list"]
