"""The engine of the strategy `jax`: programs that TensorFlow traces, on the devices that JAX drives."""
