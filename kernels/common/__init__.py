"""What every room needs: error sentences, atomic files, options of commands, numbers to read, streams, the cache of kernels."""
