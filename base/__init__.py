"""The ground floor: strict configuration, errors, seeds, paths and storage. Imports nothing of the other rooms."""
