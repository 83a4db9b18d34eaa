"""What every room needs: errors that are sentences, atomic files, options of commands, the cache of kernels."""
