"""mipfast behind the interfaces of other libraries."""
