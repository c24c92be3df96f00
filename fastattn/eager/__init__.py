"""Memory-linear pure-PyTorch implementations: any device, any dtype torch multiplies."""
