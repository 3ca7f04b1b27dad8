#!/bin/bash
# {{ not a template }}
exec "$@"
