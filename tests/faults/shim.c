/* Faults in file operations, for LD_PRELOAD: numbers every operation below a folder and lets something happen at the
 * k-th. Modes: COUNT nothing; KILL SIGKILL, a write half done; ENOSPC from k on, on every process that shares the flag,
 * for whatever needs space; EIO once; RECORD writes each operation with its data to a log. fsync only counts: what a
 * power loss takes is computed from the log. Armed by fault_arm, or by FAULT_FOLDER, FAULT_MODE and FAULT_AT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, ENOSPC_FROM, EIO_ONCE, RECORD };
enum { NEEDS_SPACE = 1 };

static char folder[PATH_MAX];
static int mode = -1, log_fd = -1;
static long at, count;
static int own_flag;
static volatile int *is_full = &own_flag;

struct event { char what; unsigned ino; long offset, path_size, other_size, data_size; };

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

void fault_arm(const char *below, int new_mode, long new_at, int new_log, volatile int *shared_flag) {
    snprintf(folder, sizeof folder, "%s", below);
    count = 0, at = new_at, log_fd = new_log, is_full = shared_flag ? shared_flag : &own_flag;
    __sync_synchronize();
    mode = new_mode;
}
long fault_count(void) { return count; }
void fault_disarm(void) { mode = -1; }

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *below = getenv("FAULT_FOLDER"), *which = getenv("FAULT_MODE"), *when = getenv("FAULT_AT");
    if (below && which && when)
        fault_arm(below, !strcmp(which, "kill") ? KILL : !strcmp(which, "enospc") ? ENOSPC_FROM : EIO_ONCE, atol(when),
                  -1, NULL);
}

static int below(const char *path) {
    size_t size = strlen(folder);
    return !strncmp(path, folder, size) && (path[size] == '/' || !path[size]);
}
static int path_of_fd(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    out[size > 0 ? size : 0] = 0;
    return size > 0 && below(out);
}
static int path_at(int dir, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (path[0] != '/' && dir == AT_FDCWD && !getcwd(base, sizeof base)) return 0;
    if (path[0] != '/' && dir != AT_FDCWD) path_of_fd(dir, base);
    return snprintf(out, PATH_MAX, "%s%s%s", base, base[0] ? "/" : "", path) < PATH_MAX && below(out);
}
static int watched_fd(int fd, char *path) { return mode >= 0 && fd != log_fd && path_of_fd(fd, path); }
static int watched(int dir, const char *path, char *out) { return mode >= 0 && path && path_at(dir, path, out); }

/* Count an operation; 1 when it must fail, with errno set. `half` is called before a kill. */
static int fails(int flags) {
    long number = __sync_add_and_fetch(&count, 1);
    if (mode == KILL && number == at) kill(getpid(), SIGKILL);
    if (mode == EIO_ONCE && number == at) return errno = EIO, 1;
    if (mode == ENOSPC_FROM && number >= at && at > 0) *is_full = 1;
    if (mode == ENOSPC_FROM && *is_full && (flags & NEEDS_SPACE)) return errno = ENOSPC, 1;
    return 0;
}
static int dies_now(void) { return mode == KILL && count + 1 == at; }

static void record(char what, unsigned ino, long offset, const char *path, const char *other, const void *data,
                   long size) {
    if (mode != RECORD) return;
    struct event head = {what, ino, offset, strlen(path), strlen(other), size};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)path, head.path_size}, {(void *)other, head.other_size},
                            {(void *)data, size}};
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (real(log_fd, parts, 4) < 0) abort();
}
static unsigned ino_of(int fd) {
    struct stat about;
    return fstat(fd, &about) ? 0 : about.st_ino;
}
static unsigned ino_at(const char *path) {
    struct stat about;
    return lstat(path, &about) ? 0 : about.st_ino;
}
/* A mark in the log, for events that are not file operations. */
void fault_mark(long number) { record('!', 0, number, "", "", "", 0); }

static long position(int fd) {
    struct stat about;
    if (fcntl(fd, F_GETFL) & O_APPEND) return fstat(fd, &about) ? 0 : about.st_size;
    return lseek(fd, 0, SEEK_CUR);
}

/* glibc has each of these under one or two names; `is_new`: the file was not there, or has lost its content. */
#define OPEN_BODY(dir, ...) \
    char full[PATH_MAX]; \
    mode_t permissions = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        permissions = va_arg(rest, mode_t); \
        va_end(rest); \
    } \
    if (!watched(dir, path, full)) return real(__VA_ARGS__); \
    int is_new = (flags & O_TRUNC) || ((flags & O_CREAT) && !ino_at(full)); \
    if (fails(flags & O_CREAT ? NEEDS_SPACE : 0)) return -1; \
    int fd = real(__VA_ARGS__); \
    if (fd >= 0 && is_new) record('o', ino_of(fd), 0, full, "", "", 0); \
    return fd;
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        OPEN_BODY(AT_FDCWD, path, flags, permissions) \
    }
#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        OPEN_BODY(dir, dir, path, flags, permissions) \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        char full[PATH_MAX]; \
        REAL(FILE *, name, const char *, const char *); \
        if (watched(AT_FDCWD, path, full) && fails(how[0] == 'r' ? 0 : NEEDS_SPACE)) return NULL; \
        return real(path, how); \
    }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    REAL(ssize_t, write, int, const void *, size_t);
    if (!watched_fd(fd, path)) return real(fd, data, size);
    if (dies_now() && size > 1 && real(fd, data, size / 2) < 0) abort();
    if (fails(NEEDS_SPACE)) return -1;
    long offset = position(fd);
    ssize_t done = real(fd, data, size);
    if (done > 0) record('w', ino_of(fd), offset, path, "", data, done);
    return done;
}
#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) { \
        char path[PATH_MAX]; \
        REAL(ssize_t, name, int, const void *, size_t, off_t); \
        if (!watched_fd(fd, path)) return real(fd, data, size, offset); \
        if (dies_now() && size > 1 && real(fd, data, size / 2, offset) < 0) abort(); \
        if (fails(NEEDS_SPACE)) return -1; \
        ssize_t done = real(fd, data, size, offset); \
        if (done > 0) record('w', ino_of(fd), offset, path, "", data, done); \
        return done; \
    }
PWRITE(pwrite) PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *parts, int number) {
    char path[PATH_MAX];
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (!watched_fd(fd, path)) return real(fd, parts, number);
    if (dies_now() && number > 1 && real(fd, parts, number / 2) < 0) abort();
    if (fails(NEEDS_SPACE)) return -1;
    long offset = position(fd);
    ssize_t done = real(fd, parts, number), left = done;
    for (int i = 0; i < number && left > 0; left -= parts[i].iov_len, offset += parts[i++].iov_len)
        record('w', ino_of(fd), offset, path, "", parts[i].iov_base, left < (ssize_t)parts[i].iov_len ? left
                                                                          : (ssize_t)parts[i].iov_len);
    return done;
}

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        char path[PATH_MAX]; \
        REAL(int, name, int, off_t); \
        if (!watched_fd(fd, path)) return real(fd, size); \
        if (fails(NEEDS_SPACE)) return -1; \
        int failed = real(fd, size); \
        if (!failed) record('t', ino_of(fd), size, path, "", "", 0); \
        return failed; \
    }
TRUNCATE(ftruncate) TRUNCATE(ftruncate64)

#define SYNC(name) \
    int name(int fd) { \
        char path[PATH_MAX]; \
        REAL(int, name, int); \
        if (!watched_fd(fd, path)) return real(fd); \
        if (fails(NEEDS_SPACE)) return -1; \
        record('s', ino_of(fd), 0, path, "", "", 0); \
        return 0; \
    }
SYNC(fsync) SYNC(fdatasync)

/* An error of close leaves the descriptor closed. */
int close(int fd) {
    char path[PATH_MAX];
    REAL(int, close, int);
    if (!watched_fd(fd, path)) return real(fd);
    int failed = fails(0), cause = errno;
    real(fd);
    errno = cause;
    return failed ? -1 : 0;
}

#define RENAME(name, signature, from_dir, to_dir, call, ...) \
    int name signature { \
        char source[PATH_MAX], target[PATH_MAX]; \
        REAL(int, name, __VA_ARGS__); \
        int is_ours = watched(from_dir, from, source) | watched(to_dir, to, target); \
        if (!is_ours) return call; \
        if (fails(NEEDS_SPACE)) return -1; \
        int failed = call; \
        if (!failed) record('r', 0, 0, source, target, "", 0); \
        return failed; \
    }
RENAME(rename, (const char *from, const char *to), AT_FDCWD, AT_FDCWD, real(from, to), const char *, const char *)
RENAME(renameat, (int a, const char *from, int b, const char *to), a, b, real(a, from, b, to), int, const char *, int,
       const char *)

#define ON_PATH(name, signature, dir, flags, what, call, ...) \
    int name signature { \
        char full[PATH_MAX]; \
        REAL(int, name, __VA_ARGS__); \
        if (!watched(dir, path, full)) return call; \
        if (fails(flags)) return -1; \
        int failed = call; \
        if (!failed) record(what, ino_at(full), 0, full, "", "", 0); \
        return failed; \
    }
ON_PATH(mkdir, (const char *path, mode_t how), AT_FDCWD, NEEDS_SPACE, 'm', real(path, how), const char *, mode_t)
ON_PATH(mkdirat, (int dir, const char *path, mode_t how), dir, NEEDS_SPACE, 'm', real(dir, path, how), int,
        const char *, mode_t)
ON_PATH(unlink, (const char *path), AT_FDCWD, 0, 'u', real(path), const char *)
ON_PATH(unlinkat, (int dir, const char *path, int how), dir, 0, 'u', real(dir, path, how), int, const char *, int)
ON_PATH(rmdir, (const char *path), AT_FDCWD, 0, 'u', real(path), const char *)
