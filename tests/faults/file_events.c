/* Preloaded into a process under test: counts what changes files below one folder, and at the n-th such event ends the
 * process as kill -9 does, in the middle of a write; or lets that event fail with an errno.
 *
 *     file_events_arm(folder, nth, error, log)   error 0: kill. nth 0: only write "operation path" lines to the file
 *                                                descriptor `log` (-1: none). last: every event from nth on fails.
 *     file_events_clock(back, after)             after so many looks at the clock it is set back by so many seconds
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char below[4096];
static long nth, seen;
static int error_number, log_to = -1, is_armed, stays;

void file_events_arm(const char *folder, long at, int error, int keep_failing, int log) {
    strncpy(below, folder, sizeof below - 1);
    nth = at, error_number = error, stays = keep_failing, log_to = log, seen = 0, is_armed = 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

static long clock_back, looks_left;

void file_events_clock(long back, long after) { clock_back = back, looks_left = after; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && clock_back && (looks_left > 0 ? looks_left--, 0 : 1)) now->tv_sec -= clock_back;
    return result;
}

static int is_below(const char *path) { return strncmp(path, below, strlen(below)) == 0; }

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
}

static void path_at(int folder, const char *name, char *path) {
    if (name[0] == '/') { strncpy(path, name, 4095); path[4095] = 0; return; }
    char parent[4096] = "";
    if (folder == AT_FDCWD) { if (!getcwd(parent, sizeof parent)) parent[0] = 0; }
    else path_of(folder, parent);
    snprintf(path, 4096, "%.2000s/%.2000s", parent, name);
}

/* 0: go on; 1: this event fails (errno is set); 2: die in it. */
static int event(const char *operation, const char *path) {
    if (!is_armed || !is_below(path)) return 0;
    seen++;
    if (log_to >= 0) dprintf(log_to, "%s %s\n", operation, path);
    if (nth == 0 || (stays && error_number ? seen < nth : seen != nth)) return 0;
    if (error_number) { errno = error_number; return 1; }
    return 2;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define BEFORE(operation, path, failed) \
    switch (event(operation, path)) { case 1: return failed; case 2: die(); }

static int writes(int flags) { return flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR); }

#define OPEN(name) \
    int name(const char *file, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        char path[4096]; \
        if (writes(flags)) { path_at(AT_FDCWD, file, path); BEFORE("open", path, -1) } \
        return real(file, flags, mode); }
OPEN(open) OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *file, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        char path[4096]; \
        if (writes(flags)) { path_at(folder, file, path); BEFORE("open", path, -1) } \
        return real(folder, file, flags, mode); }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *restrict file, const char *restrict mode) { \
        REAL(name); char path[4096]; \
        if (strpbrk(mode, "wa+")) { path_at(AT_FDCWD, file, path); BEFORE("open", path, NULL) } \
        return real(file, mode); }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(write); char path[4096];
    if (is_armed) {
        path_of(descriptor, path);
        switch (event("write", path)) { case 1: return -1; case 2: real(descriptor, data, size / 2); die(); }
    }
    return real(descriptor, data, size);
}

#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type at) { \
        REAL(name); char path[4096]; \
        if (is_armed) { path_of(descriptor, path); \
            switch (event("write", path)) { case 1: return -1; case 2: real(descriptor, data, size / 2, at); die(); } } \
        return real(descriptor, data, size, at); }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev); char path[4096];
    if (is_armed) { path_of(descriptor, path); BEFORE("write", path, -1) }
    return real(descriptor, parts, count);
}

#define ON_DESCRIPTOR(name, operation, parameters, arguments) \
    int name parameters { REAL(name); char path[4096]; \
        if (is_armed) { path_of(descriptor, path); BEFORE(operation, path, -1) } \
        return real arguments; }
ON_DESCRIPTOR(fsync, "sync", (int descriptor), (descriptor))
ON_DESCRIPTOR(fdatasync, "sync", (int descriptor), (descriptor))
ON_DESCRIPTOR(ftruncate, "truncate", (int descriptor, off_t size), (descriptor, size))
ON_DESCRIPTOR(ftruncate64, "truncate", (int descriptor, off64_t size), (descriptor, size))
ON_DESCRIPTOR(posix_fallocate, "truncate", (int descriptor, off_t at, off_t size), (descriptor, at, size))

#define ON_PATH(name, operation, parameters, arguments) \
    int name parameters { REAL(name); char path[4096]; \
        path_at(AT_FDCWD, file, path); BEFORE(operation, path, -1) \
        return real arguments; }
ON_PATH(unlink, "remove", (const char *file), (file))
ON_PATH(rmdir, "remove", (const char *file), (file))
ON_PATH(mkdir, "mkdir", (const char *file, mode_t mode), (file, mode))
ON_PATH(truncate, "truncate", (const char *file, off_t size), (file, size))
ON_PATH(link, "link", (const char *other, const char *file), (other, file))
ON_PATH(symlink, "link", (const char *other, const char *file), (other, file))
ON_PATH(rename, "rename", (const char *other, const char *file), (other, file))

#define ON_ENTRY(name, operation, parameters, arguments) \
    int name parameters { REAL(name); char path[4096]; \
        path_at(folder, file, path); BEFORE(operation, path, -1) \
        return real arguments; }
ON_ENTRY(unlinkat, "remove", (int folder, const char *file, int flags), (folder, file, flags))
ON_ENTRY(mkdirat, "mkdir", (int folder, const char *file, mode_t mode), (folder, file, mode))
ON_ENTRY(renameat, "rename", (int from, const char *other, int folder, const char *file), (from, other, folder, file))
