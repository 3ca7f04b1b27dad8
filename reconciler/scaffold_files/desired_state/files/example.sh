#!/bin/sh
echo "This file is kept as it is declared: {{ even braces }} arrive as they are."
