/* A preload that shifts the wall clock, and nothing else, by the seconds that stand in the file CLOCK_SHIFT names.
   It needs neither headers nor a C library to be built: cc -shared -fPIC -nostdlib, or tcc. */
struct timespec { long seconds, nanoseconds; };
struct timeval { long seconds, microseconds; };
extern long syscall(long number, ...);
extern char *getenv(const char *name);
extern int open(const char *path, int flags, ...);
extern void *mmap(void *where, unsigned long size, int protection, int flags, int file, long offset);

#if defined(__x86_64__)
#define CLOCK_GETTIME 228
#elif defined(__aarch64__)
#define CLOCK_GETTIME 113
#endif
enum { REALTIME = 0, REALTIME_COARSE = 5, READ = 1, SHARED = 1 };

static long shift(void)
{
    static volatile long *shared;
    if (!shared)
        shared = mmap(0, sizeof(long), READ, SHARED, open(getenv("CLOCK_SHIFT"), 0), 0);
    return *shared;
}

int clock_gettime(int clock, struct timespec *now)
{
    int failed = syscall(CLOCK_GETTIME, clock, now);
    if (!failed && (clock == REALTIME || clock == REALTIME_COARSE))
        now->seconds += shift();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec exact;
    int failed = clock_gettime(REALTIME, &exact);
    (void)zone;
    now->seconds = exact.seconds;
    now->microseconds = exact.nanoseconds / 1000;
    return failed;
}

long time(long *also)
{
    struct timespec now;
    clock_gettime(REALTIME, &now);
    if (also)
        *also = now.seconds;
    return now.seconds;
}
