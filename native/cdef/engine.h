/* What Python may call of the engine, its regions, the sentry and the guarded copies. */

struct au_engine {
    int fd;
    int notify_fd;
    uint64_t grace_ns;
    uint64_t patience_ns;
    uint64_t stall_ns;
    uint32_t flood;
    uint32_t stuck;
    uint32_t urgent;
    ...;
};

struct au_region {
    uint32_t id;
    uint32_t kind;
    int memfd;
    uint64_t start;
    uint64_t length;
    uint64_t object_length;
    uint64_t page_size;
    uint64_t block_size;
    uint64_t pages;
    uint64_t blocks;
    uint64_t serial;
    ...;
};

struct au_entry {
    uint32_t kind;
    uint32_t region;
    uint64_t block;
    uint32_t generation;
    uint32_t thread;
    struct au_uffd_msg message;
};

struct au_shared {
    uint64_t proof;
    uint64_t sequence;
    uint32_t exiting;
    uint32_t stalled;
};
extern struct au_shared au_shared;

struct au_note {
    uint32_t kind;
    uint32_t tid;
    uint64_t address;
    uint64_t waited_ns;
};

#define AU_ENTRY_MISS ...
#define AU_ENTRY_HIT ...
#define AU_ENTRY_EVENT ...
#define AU_ENTRY_RAW ...
#define AU_ENGINE_RAW ...
#define AU_ENGINE_OWN ...
#define AU_ENGINE_YIELD ...
#define AU_ENGINE_REMAPS ...
#define AU_DRAIN_LOOP ...
#define AU_DRAIN_RESCUE ...
#define AU_KIND_ANONYMOUS ...
#define AU_KIND_MEMFD ...
#define AU_KIND_HUGETLB ...
#define AU_KIND_HUGETLB_MEMFD ...
#define AU_REGION_WRITABLE ...
#define AU_REGION_REPORT_HITS ...
#define AU_REGION_FORK ...
#define AU_REGION_SERVE ...
#define AU_REGION_USER_MODE ...
#define AU_PAGE_MISSING ...
#define AU_PAGE_PRESENT ...
#define AU_PAGE_POISONED ...
#define AU_OP_COPY ...
#define AU_OP_ZERO ...
#define AU_OP_POISON ...
#define AU_OP_CONTINUE ...
#define AU_OP_MOVE ...
#define AU_OP_WRITEPROTECT ...
#define AU_OP_RWPROTECT ...
#define AU_OP_WAKE ...
#define AU_NOTE_STALL_POISON ...
#define AU_NOTE_MASKED ...
#define AU_NOTE_LOOP_STUCK ...
#define AU_NOTE_SELF_TOUCH ...
#define AU_NOTE_RENEWED ...

struct au_engine *au_engine_create(int fd, int options, int *error);
void au_engine_close(struct au_engine *engine);
void au_engine_free(struct au_engine *engine);
void au_engine_set_loop(struct au_engine *engine, uint32_t tid);
void au_engine_set_times(struct au_engine *engine, uint64_t grace_ns, uint64_t patience_ns,
                         uint64_t stall_ns);
int64_t au_engine_drain(struct au_engine *engine, struct au_entry *out, int64_t max, int role);
int64_t au_engine_blocked(struct au_engine *engine, uint64_t *pages, uint32_t *tids, int64_t max);
int au_engine_resolve(struct au_engine *engine, int op, uint64_t start, uint64_t source,
                      uint64_t length, uint64_t mode, int64_t *done);
void au_engine_notify(struct au_engine *engine);

struct au_region *au_region_create(struct au_engine *engine, uint64_t length, int kind, int options,
                                   uint64_t block_size, int *error);
void au_engine_name(struct au_region *region, const char *name);
int au_region_set_backing(struct au_region *region, const void *data, uint64_t length);
int64_t au_region_begin(struct au_region *region, uint64_t first, uint64_t count, int heal,
                        uint8_t *taken);
int64_t au_region_end(struct au_region *region, uint64_t first, uint64_t count, int keep_wanted,
                      uint8_t *wanted);
int au_region_check(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *where);
int64_t au_region_runs(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *starts,
                       uint64_t *lengths, uint8_t *states, int64_t max, uint64_t *next);
uint32_t au_region_generation(struct au_region *region, uint64_t block);
int au_region_drop(struct au_region *region, uint64_t offset, uint64_t length);
uint64_t au_error_runs(void);
void au_error_set_limit(uint64_t runs);
int au_region_inherited(struct au_region *region);
int au_region_close(struct au_region *region, int unmap);
void au_region_free(struct au_region *region);
int64_t au_region_put(struct au_region *region, int op, uint64_t offset, const uint8_t *src,
                      uint64_t length, int over_poison, uint64_t generation);
uint64_t au_region_present(struct au_region *region);
uint64_t au_region_poisoned(struct au_region *region);
uint64_t au_region_touched(struct au_region *region);

#define AU_EHWPOISON ...
int au_region_read(struct au_region *region, uint64_t offset, void *destination, uint64_t length,
                   uint64_t *where);
int au_region_touch(struct au_region *region, uint64_t offset, uint64_t length, uint64_t *where);
int au_region_find(struct au_region *region, uint64_t offset, uint64_t length, const void *needle,
                   uint64_t needle_length, uint64_t *where, int64_t *found);

struct au_wait {
    uint64_t at;
    int64_t found;
    ...;
};
int au_wait_read(struct au_region *region, uint64_t offset, void *destination, uint64_t length,
                 struct au_wait *wait);
int au_wait_find(struct au_region *region, uint64_t offset, uint64_t length, const void *needle,
                 uint64_t needle_length, struct au_wait *wait);
void au_wait_end(struct au_wait *wait);
int au_mapped(uint64_t address, uint64_t length);

int au_sentry_start(void);
int au_sentry_sees(void);
int au_sentry_take_note(struct au_note *note);
int au_rescue_wait(int timeout_ms);
int au_rescue_fd(void);
int au_rescue_take(struct au_engine *engine);
void au_rescue_wake(void);
void au_gil_exit(void);
int au_gil_leave_behind(uint32_t left, uint32_t daemon);
int au_python_exporter(const char *module);
void au_gil_know_handler(void);
int au_handler_signal(void);
int au_handler_send(uint32_t tid);

const char *au_counter_name(int which);
uint64_t au_counter_value(int which);
uint32_t au_gettid(void);
