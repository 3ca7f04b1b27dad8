"""What programs and browsers are told over HTTP. It reads the store and asks for passes; it never makes one.

Imports of the server and its libraries stand where they are used: a pass without a server pays nothing for them.
"""
