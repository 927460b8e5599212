/* What Python may call of attach.h. */

struct au_attachment {
    uint64_t address;
    uint64_t length;
    uint64_t object_size;
    int user_mode_only;
    ...;
};

#define AU_ATTACH_WRITABLE ...
#define AU_ATTACH_HUGETLB ...
#define AU_ATTACH_USER_MODE_ONLY ...
#define AU_ATTACH_ALL_FAULTS ...
#define AU_ATTACH_BACKGROUND ...
#define AU_ATTACH_SERVER_USER ...
#define AU_ATTACH_POISON ...
#define AU_ATTACH_ABORT ...

struct au_attachment *au_attach_open(const char *path, const char *object, uint64_t offset,
                                     uint64_t length, uint32_t flags, uint32_t server_user,
                                     int timeout_ms, int cancel_fd, int lost_ms, int on_lost,
                                     int *error, char *text, uint64_t text_size);
int au_attach_read(struct au_attachment *attachment, uint64_t offset, void *destination,
                   uint64_t length, uint64_t *where);
int au_attach_touch(struct au_attachment *attachment, uint64_t offset, uint64_t length,
                    uint64_t *where);
int au_attach_discard(struct au_attachment *attachment, uint64_t offset, uint64_t length);
void au_attach_refuse(struct au_attachment *attachment);
void au_attach_free(struct au_attachment *attachment);
void au_attach_forked(struct au_attachment *attachment);
int au_attach_connected(struct au_attachment *attachment);
uint64_t au_attach_resumed(struct au_attachment *attachment);
