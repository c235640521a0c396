"""Code shared by the packages of both systems: train loop, checkpoints, config, mesh, inputs."""

__version__ = "0.1.0"
