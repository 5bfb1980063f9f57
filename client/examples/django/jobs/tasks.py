"""Background jobs."""

import keyproxy_client.celery
import keyproxy_client.http
from celery import shared_task

from jobs.models import Job


@shared_task(bind=True)
def run_job(self, job_id):
    """Compute a job by the API, on behalf of the user that started it."""
    job = Job.objects.get(pk=job_id)
    with keyproxy_client.http.httpx_client() as http:
        response = http.post("/v1/ai/jobs", json={"prompt": job.prompt})
    keyproxy_client.celery.retry_later(self, response)
    job.result = response.raise_for_status().json()
    job.save(update_fields=["result"])
