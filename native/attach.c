#include "aiouffd_client.h"

#include "attach.h"
#include "guard.h"
#include "registry.h"
#include "sys.h"

_Static_assert(AU_ATTACH_WRITABLE == AIOUFFD_WRITABLE && AU_ATTACH_HUGETLB == AIOUFFD_HUGETLB &&
		       AU_ATTACH_USER_MODE_ONLY == AIOUFFD_USER_MODE_ONLY &&
		       AU_ATTACH_ALL_FAULTS == AIOUFFD_ALL_FAULTS &&
		       AU_ATTACH_BACKGROUND == AIOUFFD_BACKGROUND &&
		       AU_ATTACH_SERVER_USER == AIOUFFD_SERVER_USER &&
		       AU_ATTACH_POISON == (int)AIOUFFD_POISON &&
		       AU_ATTACH_ABORT == (int)AIOUFFD_ABORT,
	       "Python's constants are the client's");

struct au_attachment *au_attach_open(const char *path, const char *object, uint64_t offset,
				     uint64_t length, uint32_t flags, uint32_t server_user,
				     int timeout_ms, int cancel_fd, int lost_ms, int on_lost,
				     int *error, char *text, uint64_t text_size)
{
	struct aiouffd_options options = {
		.object = object,
		.offset = offset,
		.length = length,
		/* Its threads may hold the GIL that a server in here would need. */
		.flags = flags | AIOUFFD_OTHER_PROCESS,
		.server_user = server_user,
		.timeout_ms = timeout_ms,
		.cancel_fd = cancel_fd,
		.lost_ms = lost_ms,
		.on_lost = (enum aiouffd_on_lost)on_lost,
	};
	struct au_attachment *attachment = calloc(1, sizeof *attachment);
	int result;

	text[0] = 0;
	*error = ENOMEM;
	if (!attachment)
		return NULL;
	attachment->memory = aiouffd_attach(path, &options);
	if (!attachment->memory) {
		*error = errno;
		snprintf(text, text_size, "%s", aiouffd_error());
		free(attachment);
		return NULL;
	}
	attachment->address = (uint64_t)(uintptr_t)attachment->memory->address;
	attachment->length = attachment->memory->length;
	attachment->object_size = attachment->memory->object_size;
	attachment->user_mode_only = attachment->memory->user_mode_only;
	result = au_guard_start();
	if (!result && attachment->length)
		result = au_regions_add(attachment->address, attachment->memory->state_->mapped,
					NULL);
	if (result) {
		*error = -result;
		aiouffd_detach(attachment->memory);
		free(attachment);
		return NULL;
	}
	*error = 0;
	return attachment;
}

static int begin(struct au_attachment *attachment, uint64_t offset, uint64_t length)
{
	if (offset > attachment->length || length > attachment->length - offset)
		return -EINVAL;
	__atomic_fetch_add(&attachment->readers, 1, __ATOMIC_SEQ_CST);
	if (!__atomic_load_n(&attachment->closing, __ATOMIC_SEQ_CST))
		return 0;
	__atomic_fetch_sub(&attachment->readers, 1, __ATOMIC_SEQ_CST);
	return -EBADF;
}

static int end(struct au_attachment *attachment, int result, uint64_t *where)
{
	if (where)
		*where -= attachment->address;
	if (result == -EIO && __atomic_load_n(&attachment->closing, __ATOMIC_SEQ_CST))
		result = -EBADF;
	__atomic_fetch_sub(&attachment->readers, 1, __ATOMIC_SEQ_CST);
	return result;
}

int au_attach_read(struct au_attachment *attachment, uint64_t offset, void *destination,
		   uint64_t length, uint64_t *where)
{
	int result = begin(attachment, offset, length);

	if (result)
		return result;
	result = au_guard_copy(destination, attachment->memory->address + offset, length, where);
	return end(attachment, result, where);
}

int au_attach_touch(struct au_attachment *attachment, uint64_t offset, uint64_t length,
		    uint64_t *where)
{
	int result = begin(attachment, offset, length);

	if (result)
		return result;
	result = au_guard_touch(attachment->memory->address + offset, length,
				attachment->memory->state_->page_size, where);
	return end(attachment, result, where);
}

int au_attach_discard(struct au_attachment *attachment, uint64_t offset, uint64_t length)
{
	int result;

	if (offset > attachment->memory->state_->mapped ||
	    length > attachment->memory->state_->mapped - offset)
		return -EINVAL;
	/* It may be a few bytes longer than the object: up to the end of the last page. */
	result = begin(attachment, offset < attachment->length ? offset : attachment->length, 0);
	if (result)
		return result;
	result = aiouffd_discard(attachment->memory, attachment->memory->address + offset, length);
	return end(attachment, result, NULL);
}

void au_attach_refuse(struct au_attachment *attachment)
{
	__atomic_store_n(&attachment->closing, 1, __ATOMIC_SEQ_CST);
	aiouffd_refuse(attachment->memory);
	while (__atomic_load_n(&attachment->readers, __ATOMIC_SEQ_CST))
		au_sleep_ns(20000);
}

void au_attach_free(struct au_attachment *attachment)
{
	if (attachment->length)
		au_regions_remove(attachment->address);
	aiouffd_detach(attachment->memory);
	free(attachment);
}

void au_attach_forked(struct au_attachment *attachment)
{
	if (attachment->length)
		au_regions_remove(attachment->address);
	aiouffd_forked(attachment->memory);
}

int au_attach_connected(struct au_attachment *attachment)
{
	return aiouffd_connected(attachment->memory);
}

uint64_t au_attach_resumed(struct au_attachment *attachment)
{
	return aiouffd_resumed(attachment->memory);
}
