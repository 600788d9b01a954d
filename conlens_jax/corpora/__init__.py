"""Where text comes from: generators whose content is known, files, datasets."""
