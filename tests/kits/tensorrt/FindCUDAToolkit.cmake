# A stand-in for CMake's own module: CUDA::cudart whose one header lies beside this file, with no library behind it.
add_library(CUDA::cudart INTERFACE IMPORTED)
set(CUDAToolkit_FOUND TRUE)
