"""Files of arrays, whatever their names mean: npz, safetensors, HDF5."""
