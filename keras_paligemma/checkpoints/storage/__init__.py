"""Reading and writing of array files: npz, safetensors, HDF5."""
