"""A real SFTP server over TCP, for one user, on a directory of this machine."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager

import paramiko
from paramiko import SFTPAttributes, SFTPServer

USER, PASSWORD = "worker", "p4ss-of-the-worker"


class _Login(paramiko.ServerInterface):
    def __init__(self, key):
        self._key = key

    def check_auth_password(self, username, password):
        right = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username, key):
        right = username == USER and key.get_base64() == self._key.get_base64()
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED

    def get_allowed_auths(self, username):
        return "password,publickey"


class _Files(paramiko.SFTPServerInterface):
    """Answers with the system calls that the requests are named for."""

    def __init__(self, server, *args, root, **kwargs):
        super().__init__(server, *args, **kwargs)
        self._root = root

    def _place(self, path):
        return self._root + self.canonicalize(path)

    def _answer(self, call, *args):
        try:
            call(*args)
        except OSError as error:
            return SFTPServer.convert_errno(error.errno)
        return paramiko.SFTP_OK

    def list_folder(self, path):
        place = self._place(path)
        try:
            return [
                SFTPAttributes.from_stat(entry.stat(), entry.name) for entry in os.scandir(place)
            ]
        except OSError as error:
            return SFTPServer.convert_errno(error.errno)

    def stat(self, path):
        try:
            return SFTPAttributes.from_stat(os.stat(self._place(path)))
        except OSError as error:
            return SFTPServer.convert_errno(error.errno)

    lstat = stat

    def open(self, path, flags, attr):
        try:
            file = os.fdopen(os.open(self._place(path), flags, 0o644), "r+b" if flags & 3 else "rb")
        except OSError as error:
            return SFTPServer.convert_errno(error.errno)
        handle = paramiko.SFTPHandle(flags)
        handle.readfile = handle.writefile = file
        handle.stat = lambda: SFTPAttributes.from_stat(os.fstat(file.fileno()))
        return handle

    def remove(self, path):
        return self._answer(os.remove, self._place(path))

    def rmdir(self, path):
        return self._answer(os.rmdir, self._place(path))

    def mkdir(self, path, attr):
        return self._answer(os.mkdir, self._place(path))

    def rename(self, oldpath, newpath):
        return self._answer(os.rename, self._place(oldpath), self._place(newpath))

    posix_rename = rename


class Server:
    """Where the server is, and what its user and its clients need."""

    def __init__(self, root):
        self.root = root
        self.host_key, self.user_key = (
            paramiko.RSAKey.generate(2048),
            paramiko.RSAKey.generate(2048),
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._transports = []

    def serve(self):
        """Take connections until the socket is closed."""
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            transport = paramiko.Transport(client)
            transport.add_server_key(self.host_key)
            transport.set_subsystem_handler("sftp", SFTPServer, _Files, root=str(self.root))
            self._transports.append(transport)
            transport.start_server(event=threading.Event(), server=_Login(self.user_key))

    def stop(self):
        """Take no more connections, and end those there are."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for transport in self._transports:
            transport.close()


@contextmanager
def running_server(root):
    """Run a server on a directory."""
    server = Server(root)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
