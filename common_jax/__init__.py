"""What the packages of both systems share: train loop, checkpoints, config, mesh, inputs."""

__version__ = "0.1.0"
