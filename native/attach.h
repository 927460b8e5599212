/* Memory of this process that another process fills: the C client (include/aiouffd_client.h), and
 * copies out of it that survive a poisoned page.
 *
 * Nothing here needs the GIL, and neither does the client's thread: a touch that holds the GIL is
 * served by a process that has nothing to do with it.
 */
#ifndef AU_ATTACH_H
#define AU_ATTACH_H

#include <stdint.h>

struct aiouffd;

struct au_attachment {
	uint64_t address;
	uint64_t length;      /* bytes of the object; 0: there is no memory */
	uint64_t object_size; /* bytes */
	int user_mode_only;
	struct aiouffd *memory;
	uint32_t readers; /* guarded copies under way */
	uint32_t closing;
};

#define AU_ATTACH_WRITABLE 1
#define AU_ATTACH_HUGETLB 2
#define AU_ATTACH_USER_MODE_ONLY 4
#define AU_ATTACH_ALL_FAULTS 8
#define AU_ATTACH_BACKGROUND 16
#define AU_ATTACH_SERVER_USER 128
#define AU_ATTACH_POISON 0
#define AU_ATTACH_ABORT 1

/* Attach; see aiouffd_attach.  NULL with a positive errno in *error and the reason in `text`. */
struct au_attachment *au_attach_open(const char *path, const char *object, uint64_t offset,
				     uint64_t length, uint32_t flags, uint32_t server_user,
				     int timeout_ms, int cancel_fd, int lost_ms, int on_lost,
				     int *error, char *text, uint64_t text_size);

/* Copy out, touch each page, drop: 0, -EINVAL past the end, -EIO with *where when a page is
 * poisoned, -EBADF when it was closed meanwhile. */
int au_attach_read(struct au_attachment *attachment, uint64_t offset, void *destination,
		   uint64_t length, uint64_t *where);
int au_attach_touch(struct au_attachment *attachment, uint64_t offset, uint64_t length,
		    uint64_t *where);
int au_attach_discard(struct au_attachment *attachment, uint64_t offset, uint64_t length);

/* Let the server go; what is missing is poison from now on.  Waits for copies under way. */
void au_attach_refuse(struct au_attachment *attachment);

/* The memory goes.  Nobody may be in any of the calls above. */
void au_attach_free(struct au_attachment *attachment);

/* In a forked child, instead. */
void au_attach_forked(struct au_attachment *attachment);

int au_attach_connected(struct au_attachment *attachment);
uint64_t au_attach_resumed(struct au_attachment *attachment);

#endif
