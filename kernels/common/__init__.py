"""What two or more kernels share."""
