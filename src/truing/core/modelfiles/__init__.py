"""Models as files: bases, adapters, conversion, fetching, licences."""
