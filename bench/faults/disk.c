/* A disk that fails, for processes that load this library before libc (LD_PRELOAD).

   DISK_FAULTS, or disk_faults() later on, holds rules, one per line:

       CALL ACTION VALUE FIRST LAST BYTE TEXT

   CALL      open, write, fsync, rename, mkdir or read
   ACTION    error (VALUE: errno), delay (VALUE: milliseconds, then the call itself) or flip (VALUE: bits to flip in a byte read)
   FIRST     the number of the first call that the rule disturbs, among those that it fits, from 1, in each process
   LAST      the number of the last one; 0: all that follow
   BYTE      error of a write: what a file may hold; a write beyond is cut off there, and only those that begin there fail
             flip: the place of the byte in the file, modulo the file's size
   TEXT      what the path must contain: the rest of the line, spaces included

   `open` fits those that may write, and links. A mapped file counts as read. glibc's own streams (fopen and fwrite of other
   programs) can only be refused to open. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { RULES = 16, PATH_BYTES = 4096 };

typedef struct {
    char call[8], action[8], text[256];
    long value, first, last, byte;
    long seen; /* calls that it fitted, in this process */
} Rule;

static Rule rules[RULES];
static int number_of_rules;

/* Replace all rules. */
void disk_faults(const char *text) {
    number_of_rules = 0;
    while (text && *text && number_of_rules < RULES) {
        Rule rule = {.seen = 0};
        int begin = 0;
        size_t length = strcspn(text, "\n");
        int fields = sscanf(text, "%7s %7s %ld %ld %ld %ld %n", rule.call, rule.action, &rule.value, &rule.first,
                            &rule.last, &rule.byte, &begin);
        if (fields == 6 && begin > 0 && (size_t)begin < length && length - begin < sizeof rule.text) {
            memcpy(rule.text, text + begin, length - begin);
            rules[number_of_rules++] = rule;
        } else {
            fprintf(stderr, "DISK_FAULTS: not a rule: %.*s\n", (int)length, text);
            _exit(2);
        }
        text += length + (text[length] == '\n');
    }
}

__attribute__((constructor)) static void begin(void) { disk_faults(getenv("DISK_FAULTS")); }

#define NEXT(name) ((__typeof__(&name))next(#name))

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

/* Count a call that a rule fits; return whether the rule disturbs it. */
static int counts(Rule *rule) {
    long number = __atomic_add_fetch(&rule->seen, 1, __ATOMIC_RELAXED);
    return number >= rule->first && (!rule->last || number <= rule->last);
}

static int fits(const Rule *rule, const char *call, const char *path) {
    return !strcmp(rule->call, call) && path && strstr(path, rule->text);
}

static void wait_for(const Rule *rule) {
    struct timespec time = {rule->value / 1000, rule->value % 1000 * 1000000};
    nanosleep(&time, NULL);
}

/* Delay a call on a path; return the errno that it fails with, 0: it does not. */
static int disturbed(const char *call, const char *path) {
    for (int i = 0; i < number_of_rules; i++) {
        Rule *rule = rules + i;
        if (!strcmp(rule->action, "flip") || !fits(rule, call, path) || !counts(rule)) continue;
        if (!strcmp(rule->action, "error")) return (int)rule->value;
        wait_for(rule);
    }
    return 0;
}

/* Return the path of an open file, "" where it has none; the buffer holds PATH_BYTES. */
static const char *path_of(int file, char *buffer) {
    char name[32];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlink, name, buffer, PATH_BYTES - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static int fails_with(int error) {
    errno = error;
    return -1;
}

/* Disturb a write of `count` bytes at `place` (-1: where the file is); return how many may be written, -1: it fails. */
static ssize_t room(int file, size_t count, off_t place) {
    char buffer[PATH_BYTES];
    const char *path = number_of_rules ? path_of(file, buffer) : "";
    for (int i = 0; i < number_of_rules; i++) {
        Rule *rule = rules + i;
        if (!fits(rule, "write", path)) continue;
        if (!strcmp(rule->action, "delay")) {
            if (counts(rule)) wait_for(rule);
            continue;
        }
        struct stat status;
        int appends = fcntl(file, F_GETFL) & O_APPEND;
        off_t start = place >= 0 ? place : lseek(file, 0, SEEK_CUR);
        if ((appends || start < 0) && !fstat(file, &status)) start = status.st_size;
        if (start + (off_t)count <= rule->byte || !counts(rule)) continue;
        if (start >= rule->byte) return fails_with((int)rule->value);
        count = (size_t)(rule->byte - start);
    }
    return (ssize_t)count;
}

/* Flip bits in `count` bytes that were read at `place` of a file. */
static void flip(int file, char *bytes, ssize_t count, off_t place) {
    char buffer[PATH_BYTES];
    struct stat status;
    const char *path = path_of(file, buffer);
    for (int i = 0; i < number_of_rules; i++) {
        Rule *rule = rules + i;
        if (strcmp(rule->action, "flip") || !fits(rule, "read", path) || fstat(file, &status) || !status.st_size) continue;
        off_t byte = rule->byte % status.st_size;
        if (byte >= place && byte < place + count && counts(rule)) bytes[byte - place] ^= (char)rule->value;
    }
}

static int refused(const char *path, int flags) {
    return number_of_rules && (flags & O_ACCMODE) != O_RDONLY ? disturbed("open", path) : 0;
}

#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        va_list list;                                                  \
        va_start(list, flags);                                         \
        mode_t mode = va_arg(list, mode_t);                            \
        va_end(list);                                                  \
        int error = refused(path, flags);                              \
        return error ? fails_with(error) : NEXT(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
    int name(int folder, const char *path, int flags, ...) {           \
        va_list list;                                                  \
        va_start(list, flags);                                         \
        mode_t mode = va_arg(list, mode_t);                            \
        va_end(list);                                                  \
        int error = refused(path, flags);                              \
        return error ? fails_with(error) : NEXT(name)(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                    \
    FILE *name(const char *path, const char *mode) {                   \
        int error = refused(path, mode[0] == 'r' && !strchr(mode, '+') ? O_RDONLY : O_RDWR); \
        return error ? (errno = error, NULL) : NEXT(name)(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *bytes, size_t count) {
    ssize_t allowed = room(file, count, -1);
    return allowed < 0 ? -1 : NEXT(write)(file, bytes, (size_t)allowed);
}

#define PWRITE(name, offset)                                           \
    ssize_t name(int file, const void *bytes, size_t count, offset place) { \
        ssize_t allowed = room(file, count, place);                    \
        return allowed < 0 ? -1 : NEXT(name)(file, bytes, (size_t)allowed, place); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    ssize_t allowed = room(file, bytes, -1);
    if (allowed < 0) return -1;
    if ((size_t)allowed == bytes || !count) return NEXT(writev)(file, parts, count);
    size_t first = parts[0].iov_len < (size_t)allowed ? parts[0].iov_len : (size_t)allowed;
    return NEXT(write)(file, parts[0].iov_base, first);
}

#define READ(name, parameters, place, ...)                             \
    ssize_t name parameters {                                          \
        char buffer[PATH_BYTES];                                       \
        int error = number_of_rules ? disturbed("read", path_of(file, buffer)) : 0; \
        if (error) return fails_with(error);                           \
        ssize_t done = NEXT(name)(__VA_ARGS__);                        \
        if (done > 0 && number_of_rules) flip(file, bytes, done, place); \
        return done;                                                   \
    }
READ(read, (int file, void *bytes, size_t count), lseek(file, 0, SEEK_CUR) - done, file, bytes, count)
READ(pread, (int file, void *bytes, size_t count, off_t start), start, file, bytes, count, start)
READ(pread64, (int file, void *bytes, size_t count, off64_t start), start, file, bytes, count, start)

#define MMAP(name, offset)                                             \
    void *name(void *address, size_t length, int protection, int flags, int file, offset start) { \
        char buffer[PATH_BYTES];                                       \
        int wrong = 0;                                                 \
        if (number_of_rules && file >= 0 && protection & PROT_READ && !(protection & PROT_EXEC)) { \
            const char *path = path_of(file, buffer);                  \
            for (int i = 0; i < number_of_rules; i++)                  \
                wrong |= !strcmp(rules[i].action, "flip") && fits(rules + i, "read", path); \
        }                                                              \
        if (!wrong) return NEXT(name)(address, length, protection, flags, file, start); \
        void *bytes = NEXT(name)(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, start); \
        if (bytes != MAP_FAILED) flip(file, bytes, (ssize_t)length, start); \
        return bytes;                                                  \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

#define SYNC(name)                                                     \
    int name(int file) {                                               \
        char buffer[PATH_BYTES];                                       \
        int error = number_of_rules ? disturbed("fsync", path_of(file, buffer)) : 0; \
        return error ? fails_with(error) : NEXT(name)(file);           \
    }
SYNC(fsync)
SYNC(fdatasync)

/* Of two paths either may fit. */
static int disturbed_both(const char *call, const char *from, const char *to) {
    char both[2 * PATH_BYTES];
    if (!number_of_rules) return 0;
    snprintf(both, sizeof both, "%s\n%s", from, to);
    return disturbed(call, both);
}

int rename(const char *from, const char *to) {
    int error = disturbed_both("rename", from, to);
    return error ? fails_with(error) : NEXT(rename)(from, to);
}

int renameat(int folder, const char *from, int other, const char *to) {
    int error = disturbed_both("rename", from, to);
    return error ? fails_with(error) : NEXT(renameat)(folder, from, other, to);
}

int link(const char *from, const char *to) {
    int error = disturbed_both("open", from, to);
    return error ? fails_with(error) : NEXT(link)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    int error = number_of_rules ? disturbed("mkdir", path) : 0;
    return error ? fails_with(error) : NEXT(mkdir)(path, mode);
}
