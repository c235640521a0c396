"""What m2mkd_jax and cliptrans_jax share: train loop, checkpoints, config, mesh, inputs."""

__version__ = "0.1.0"
