"""C kernels on a CPU: the toolchain, the loading of libraries, and the vector primitives."""
