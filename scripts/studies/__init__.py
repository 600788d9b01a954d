"""Studies of the method that serve this repository; the scripts beside this folder run them."""
