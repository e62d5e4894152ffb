"""Where the defaults of `jlar.Monitor` come from: synthetic runs, and the error rates on them."""
