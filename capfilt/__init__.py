"""capfilt: web image-text pairs in, a bootstrapped corpus and retrained vision-language models out."""
