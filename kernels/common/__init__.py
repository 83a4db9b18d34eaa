"""What every room needs: error sentences, atomic files, options of commands, numbers to read, the cache of kernels."""
