/* Calls on files below one directory: counted, logged, and one of them disturbed.
 *
 * Loaded with LD_PRELOAD, so that it sees the writes of every library, whatever language it is
 * in. The process arms it after it has started (fault_arm).
 * A call is of one kind; only calls of the kinds asked for are counted, from 1 on. Python's
 * tests/faults/lab.py drives it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, RENAME = 8, REMOVE = 16, MKDIR = 32, LINK = 64,
       OPEN = 128, READ = 256 };
/* What happens at the call: nothing, the process is killed before it, killed when half of it
 * is written, it fails, it and all later ones fail, half is written and it succeeds, SIGTERM or
 * SIGINT comes before it. */
enum { NOTHING, KILL, TORN, FAIL, FAIL_ON, SHORT, TERMINATE, INTERRUPT };

static char root[PATH_MAX];
static int mode, kinds, error_number, log_descriptor = -1;
static long at;
static atomic_long calls;

void fault_arm(const char *below, int what, long when, int number, int of, int descriptor) {
    snprintf(root, sizeof root, "%s", below);
    mode = what; at = when; error_number = number; kinds = of; log_descriptor = descriptor;
    calls = 0;
}

#define REAL(result, name, ...)                                          \
    static result (*real)(__VA_ARGS__);                                  \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int is_below(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (!path[length] || path[length] == '/');
}

/* The absolute name of an open file. */
static int name_of(int descriptor, char *name) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, name, PATH_MAX - 1);
    name[length < 0 ? 0 : length] = 0;
    return is_below(name);
}

static int absolute(int directory, const char *path, char *name) {
    if (path[0] == '/') {
        snprintf(name, PATH_MAX, "%s", path);
    } else {
        char place[PATH_MAX] = "";
        if (directory == AT_FDCWD) {
            if (!getcwd(place, sizeof place)) place[0] = 0;
        } else {
            name_of(directory, place);
        }
        if (snprintf(name, PATH_MAX, "%s/%s", place, path) >= PATH_MAX) name[0] = 0;
    }
    return is_below(name);
}

/* What is to happen at this call: one of the modes. */
static int disturbed(int kind, const char *what, const char *one, const char *other) {
    if (!(kind & kinds)) return NOTHING;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (log_descriptor >= 0) {
        char line[3 * PATH_MAX];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", what, one, other);
        REAL(ssize_t, "write", int, const void *, size_t);
        if (real(log_descriptor, line, length) < 0) _exit(99);
    }
    if (mode == FAIL_ON ? number < at : number != at) return NOTHING;
    if (mode == KILL || (mode == TORN && kind != WRITE)) kill(getpid(), SIGKILL);
    if (mode == TERMINATE) kill(getpid(), SIGTERM);
    if (mode == INTERRUPT) kill(getpid(), SIGINT);
    if (mode == FAIL || mode == FAIL_ON) { errno = error_number; return FAIL; }
    return mode == TORN || mode == SHORT ? mode : NOTHING;
}

static int below_two(int d1, const char *p1, int d2, const char *p2, char *a, char *b) {
    int one = absolute(d1, p1, a), other = absolute(d2, p2, b);
    return one || other;
}

#define WRITES(descriptor, what, whole, half)                                       \
    char name[PATH_MAX];                                                            \
    int fate = NOTHING;                                                             \
    if (mode | kinds && name_of(descriptor, name)) fate = disturbed(WRITE, what, name, ""); \
    if (fate == FAIL) return -1;                                                    \
    if (fate == NOTHING) return whole;                                              \
    ssize_t done = half;                                                            \
    if (fate == TORN) kill(getpid(), SIGKILL);                                      \
    return done

ssize_t write(int fd, const void *bytes, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    WRITES(fd, "write", real(fd, bytes, n), real(fd, bytes, (n + 1) / 2));
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    WRITES(fd, "write", real(fd, bytes, n, offset), real(fd, bytes, (n + 1) / 2, offset));
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t offset) {
    return pwrite64(fd, bytes, n, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    WRITES(fd, "write", real(fd, parts, number),
           write(fd, parts[0].iov_base, (parts[0].iov_len + 1) / 2));
}

/* What is read by a copy is counted as a read too, if reads are counted. */
static int unreadable(int descriptor) {
    char name[PATH_MAX];
    return kinds & READ && name_of(descriptor, name) && disturbed(READ, "read", name, "") == FAIL;
}

ssize_t read(int fd, void *bytes, size_t n) {
    REAL(ssize_t, "read", int, void *, size_t);
    return unreadable(fd) ? -1 : real(fd, bytes, n);
}

ssize_t pread64(int fd, void *bytes, size_t n, off64_t offset) {
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    return unreadable(fd) ? -1 : real(fd, bytes, n, offset);
}

ssize_t pread(int fd, void *bytes, size_t n, off_t offset) {
    return pread64(fd, bytes, n, offset);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (unreadable(in)) return -1;
    WRITES(out, "copy", real(in, from, out, to, n, flags),
           real(in, from, out, to, (n + 1) / 2, flags));
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t n) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    if (unreadable(in)) return -1;
    WRITES(out, "copy", real(out, in, offset, n), real(out, in, offset, (n + 1) / 2));
}

ssize_t sendfile(int out, int in, off_t *offset, size_t n) {
    return sendfile64(out, in, offset, n);
}

#define CALLS_ON_FILE(function, arguments, types, kind, what, ...)                 \
    int function types {                                                           \
        REAL(int, #function, __VA_ARGS__);                                         \
        char name[PATH_MAX];                                                       \
        if (mode | kinds && name_of(fd, name) && disturbed(kind, what, name, "") == FAIL) \
            return -1;                                                             \
        return real arguments;                                                     \
    }

CALLS_ON_FILE(fsync, (fd), (int fd), SYNC, "sync", int)
CALLS_ON_FILE(fdatasync, (fd), (int fd), SYNC, "sync", int)
CALLS_ON_FILE(ftruncate64, (fd, n), (int fd, off64_t n), WRITE, "truncate", int, off64_t)
CALLS_ON_FILE(ftruncate, (fd, n), (int fd, off_t n), WRITE, "truncate", int, off_t)

#define CALLS_ON_PATH(function, arguments, types, directory, kind, what, ...)      \
    int function types {                                                           \
        REAL(int, #function, __VA_ARGS__);                                         \
        char name[PATH_MAX];                                                       \
        if (mode | kinds && absolute(directory, path, name)                        \
            && disturbed(kind, what, name, "") == FAIL)                            \
            return -1;                                                             \
        return real arguments;                                                     \
    }

CALLS_ON_PATH(unlink, (path), (const char *path), AT_FDCWD, REMOVE, "remove", const char *)
CALLS_ON_PATH(rmdir, (path), (const char *path), AT_FDCWD, REMOVE, "remove", const char *)
CALLS_ON_PATH(unlinkat, (at_directory, path, flags),
              (int at_directory, const char *path, int flags), at_directory, REMOVE, "remove",
              int, const char *, int)
CALLS_ON_PATH(mkdir, (path, rights), (const char *path, mode_t rights), AT_FDCWD, MKDIR, "mkdir",
              const char *, mode_t)

#define CALLS_ON_TWO(function, arguments, types, d1, d2, kind, what, ...)          \
    int function types {                                                           \
        REAL(int, #function, __VA_ARGS__);                                         \
        char a[PATH_MAX], b[PATH_MAX];                                             \
        if (mode | kinds && below_two(d1, from, d2, to, a, b)                      \
            && disturbed(kind, what, a, b) == FAIL)                                \
            return -1;                                                             \
        return real arguments;                                                     \
    }

CALLS_ON_TWO(rename, (from, to), (const char *from, const char *to), AT_FDCWD, AT_FDCWD, RENAME,
             "rename", const char *, const char *)
CALLS_ON_TWO(renameat, (one, from, other, to),
             (int one, const char *from, int other, const char *to), one, other, RENAME,
             "rename", int, const char *, int, const char *)
CALLS_ON_TWO(link, (from, to), (const char *from, const char *to), AT_FDCWD, AT_FDCWD, LINK,
             "link", const char *, const char *)
CALLS_ON_TWO(linkat, (one, from, other, to, flags),
             (int one, const char *from, int other, const char *to, int flags), one, other,
             LINK, "link", int, const char *, int, const char *, int)

#define OPENS(function, directory, types, first, ...)                              \
    int function types {                                                           \
        REAL(int, #function, __VA_ARGS__, int, ...);                               \
        mode_t rights = 0;                                                         \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                 \
            va_list more;                                                          \
            va_start(more, flags);                                                 \
            rights = va_arg(more, mode_t);                                         \
            va_end(more);                                                          \
        }                                                                          \
        char name[PATH_MAX];                                                       \
        int kind = flags & O_CREAT ? CREATE : OPEN;                                \
        if (kinds & kind && absolute(directory, path, name)                        \
            && disturbed(kind, kind == OPEN ? "open" : "create", name, "") == FAIL) \
            return -1;                                                             \
        return real(first path, flags, rights);                                    \
    }
#define NONE

OPENS(open, AT_FDCWD, (const char *path, int flags, ...), NONE, const char *)
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), NONE, const char *)
#define AND_DIRECTORY at_directory,
OPENS(openat, at_directory, (int at_directory, const char *path, int flags, ...), AND_DIRECTORY,
      int, const char *)
OPENS(openat64, at_directory, (int at_directory, const char *path, int flags, ...),
      AND_DIRECTORY, int, const char *)
